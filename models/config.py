"""`DecoderConfig`: every number of every family in one frozen, hashable record."""

import dataclasses
import functools
import json
from typing import Annotated, Any

import numpy as np

from kvjax.fields import (
    Amount,
    Checked,
    OneOf,
    Positive,
    PositiveReal,
    Range,
    Share,
    Token,
)
from kvjax.messages import shown
from kvjax.rope import Rope
from kvjax.types import LayerSpec

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


EVICTORS = ("neuron", "mlp")

Layers = Annotated[int, Range(1, 10_000)]
Epsilon = Annotated[float, Range(above=0, below=1)]

HeadGates = tuple[tuple[Share, ...], ...]
"""A number per layer and KV head, `[L][K]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evictor(Checked):
    """How a model says which of its tokens may be evicted (`LayerInputs.retention`).

    `neuron`: minus `gain * x - offset`, where `x` is the last channel, before RoPE, of
    the first query head of each KV head's group. The channel takes no part in
    attention. No weights are added. `mlp`: two linear layers with GELU between them on
    what enters the layer's attention.

    Attributes:
        kind: one of `EVICTORS`.
        gain, offset: of `neuron`.
        hidden: width of `mlp`.

    Source: DMS (2506.05345) section 3 for `neuron` (offset 5); its authors' code has a
    gain of 100, since it trains little else. KVzap for `mlp` (512).
    """

    kind: Annotated[str, OneOf(*EVICTORS)] = "neuron"
    gain: float = 10.0
    offset: float = 5.0
    hidden: Positive = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection(Checked):
    """Bases in which a model lets its keys or values be cut short.

    Weights of `[K, D, D]` per layer and side, which take no part in the model itself:
    `LayerInputs.key_basis` and `value_basis`.

    Attributes:
        keys: whether keys, before RoPE, have one.
        values: whether values have one.
    """

    keys: bool = True
    values: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not (self.keys or self.values):
            raise ValueError(
                "a projection needs `keys`, `values` or both; got neither. Leave it "
                "out instead."
            )

    @property
    def sides(self) -> tuple[str, ...]:
        """`key` and `value`, those that have one."""
        return ("key",) * self.keys + ("value",) * self.values


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Checked):
    """What a decoder computes; families differ by these fields and by nothing else.

    Attributes:
        family: `model_type` of the checkpoint, a name of `models.families.FAMILIES`.
        vocab_size: `V`.
        hidden_size: `E`.
        intermediate_size: width of the gated feed-forward block.
        num_layers: `L`.
        num_heads: query heads `H`.
        num_kv_heads: key/value heads `K`; divides `H`.
        head_dim: `D`.
        rope: rotary embedding of full-attention layers.
        local_rope: rotary embedding of sliding-window layers; None uses `rope`.
        windows: sliding window of each layer (None: full); empty means all full.
        max_positions: context length of the checkpoint.
        norm_eps: epsilon of every RMSNorm.
        norm_offset: norms multiply by `1 + weight` instead of `weight`.
        activation: of the gate, one of `ACTIVATIONS`.
        qkv_bias, o_bias, mlp_bias: biases of the projections.
        qk_norm: RMSNorm over `D` on queries and keys, before RoPE.
        post_norms: further norms on the output of attention and feed-forward.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: factor on embeddings, rounded to their dtype.
        attention_scale: factor on `q . k`; None is `1 / sqrt(D)`.
        attention_softcap, final_softcap: `cap * tanh(x / cap)` on logits.
        init_std: standard deviation of fresh weights.
        bos_token, pad_token, eos_tokens: special tokens, where the checkpoint has them.
        evictor: the model's own say on eviction, or None.
        projection: the model's own bases of keys and values, or None.
        head_gates: `[L][K]` in [0, 1], how much each KV head needs the whole context
            (`LayerSpec.head_ranks` is their order); empty: unknown.
        generation: the checkpoint's `generation_config.json`, without token ids, as
            JSON. No part of what the decoder computes: configs that differ in it are
            equal.
    """

    family: str = "llama"
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_layers: Layers
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    rope: Rope
    local_rope: Rope | None = None
    windows: tuple[Positive | None, ...] = ()
    max_positions: Positive = 2048
    norm_eps: Epsilon = 1e-6
    norm_offset: bool = False
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tie_embeddings: bool = False
    embedding_scale: PositiveReal | None = None
    attention_scale: PositiveReal | None = None
    attention_softcap: PositiveReal | None = None
    final_softcap: PositiveReal | None = None
    init_std: Amount = 0.02
    bos_token: Token | None = None
    pad_token: Token | None = None
    eos_tokens: tuple[Token, ...] = ()
    evictor: Evictor | None = None
    projection: Projection | None = None
    head_gates: HeadGates = ()
    generation: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_kv_heads` must divide `num_heads`; got "
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"`windows` needs one entry per layer; got {len(self.windows)} for "
                f"num_layers={self.num_layers}. Leave it empty for full attention."
            )
        for rope in (self.rope, self.local_rope):
            if rope is not None and rope.head_dim != self.head_dim:
                raise ValueError(
                    f"RoPE is for head_dim={rope.head_dim}, the model has "
                    f"head_dim={self.head_dim}."
                )
        if self.head_gates:
            self._check_gates()

    def _check_gates(self) -> None:
        shape = [len(row) for row in self.head_gates]
        if shape != [self.num_kv_heads] * self.num_layers:
            raise ValueError(
                f"`head_gates` needs {self.num_layers} rows (layers) of "
                f"{self.num_kv_heads} numbers (KV heads); got rows of {shape}."
            )

    @property
    def generation_settings(self) -> dict[str, Any]:
        """`generation`, as a mapping."""
        return json.loads(self.generation or "{}")

    @functools.cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One `LayerSpec` per layer, in order."""
        windows = self.windows or (None,) * self.num_layers
        scale = self.attention_scale
        local = self.local_rope or self.rope
        ranks = _ranks(self.head_gates) or ((),) * self.num_layers
        return tuple(
            LayerSpec(
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                scale=self.head_dim**-0.5 if scale is None else scale,
                rope=self.rope if window is None else local,
                window=window,
                softcap=self.attention_softcap,
                head_ranks=ranks[index],
            )
            for index, window in enumerate(windows)
        )


def read_gates(rows: Any) -> HeadGates:
    """Gates of an array or of lists.

    Raises:
        ValueError: not a list of numbers per layer.
    """
    try:
        return tuple(tuple(float(gate) for gate in row) for row in rows)
    except (TypeError, ValueError):
        raise ValueError(
            f"`head_gates` must be a list of numbers per layer; got {shown(rows)}."
        ) from None


def _ranks(gates: HeadGates) -> tuple[tuple[int, ...], ...]:
    """Place of every gate among all, the largest first; ties go to the lower head."""
    flat = np.array([gate for row in gates for gate in row])
    ranks = np.argsort(np.argsort(-flat, kind="stable"), kind="stable").tolist()
    sizes = np.cumsum([0, *map(len, gates)])
    return tuple(tuple(ranks[a:b]) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
