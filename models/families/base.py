"""What the families share: reading a config, writing one, naming the weights."""

import abc
import dataclasses
import functools
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from kvjax.config import decode
from kvjax.fields import Amount, OneOf, Positive, PositiveReal
from kvjax.messages import shown
from kvjax.models.config import (
    DecoderConfig,
    Epsilon,
    Evictor,
    HeadGates,
    Layers,
    Projection,
)
from kvjax.models.families.rotary import reach, read_rope, rope_settings, write_rope
from kvjax.models.families.settings import Settings
from kvjax.models.quantised import check_settings
from kvjax.rope import Rope

LOG = logging.getLogger("kvjax.models")

EVICTOR, HEAD_GATES = "kvjax_evictor", "kvjax_head_gates"
PROJECTION = "kvjax_projection"
"""Our own keys of `config.json`; other libraries read over them."""

OWN = ((EVICTOR, "evictor", Evictor), (PROJECTION, "projection", Projection))

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

# Settings of other architectures that change the numbers. A config that turns one on
# is refused, unless its family reads it (`AbstractFamily.reads`).
_REFUSED = (
    "alibi",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "dual_chunk_attention_config",
    "embedding_multiplier",
    "final_logit_softcapping",
    "is_encoder_decoder",
    "logit_scale",
    "logits_scaling",
    "n_routed_experts",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "qk_layernorm",
    "residual_multiplier",
    "text_config",
    "use_bidirectional_attention",
    "use_mrope",
    "use_parallel_residual",
    "use_qk_norm",
    "vision_config",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """Where one checkpoint tensor lives in the decoder.

    Attributes:
        paths: decoder parameters that the tensor holds, stacked along its first axis.
        transpose: the checkpoint stores `[out, in]`, the decoder `[in, out]`.
        layer: the layer that it belongs to, whose place in the parameters' first axis
            it has; None for parameters of no layer.
    """

    paths: tuple[str, ...]
    transpose: bool = False
    layer: int | None = None


class AbstractFamily(abc.ABC):
    """One `model_type`: its `config.json` and its tensor names, both ways."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What transformers assumes for keys that a config leaves out."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Keys of `_REFUSED` that this family understands."""
    theta: ClassVar[float] = 10_000.0
    partial_rotary: ClassVar[bool] = False
    linear_extends: ClassVar[bool] = True
    """Its configs with `linear` RoPE keep the range from before; False: the new one."""

    @abc.abstractmethod
    def extras(self, config: Settings) -> dict[str, Any]:
        """`DecoderConfig` fields that are this family's own."""

    @abc.abstractmethod
    def write_extras(self, config: DecoderConfig) -> dict[str, Any]:
        """`config.json` keys that are this family's own."""

    def read(self, raw: Mapping[str, Any]) -> DecoderConfig:
        """`DecoderConfig` of a `config.json`.

        Raises:
            ValueError: a required key is missing, or a setting that would change the
                numbers is not supported.
        """
        config = Settings(raw, self.defaults)
        self._refuse(config.values)
        heads = config.get("num_attention_heads", Positive)
        hidden = config.get("hidden_size", Positive)
        vocab = config.get("vocab_size", Positive)
        if "head_dim" not in config and hidden % heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size` where `head_dim` is "
                f"not given; got {heads} and {hidden}."
            )
        head_dim = config.get("head_dim", Positive, hidden // heads)
        fields = {
            "family": self.model_type,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": config.get("intermediate_size", Positive),
            "num_layers": config.get("num_hidden_layers", Layers),
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads", Positive, heads),
            "head_dim": head_dim,
            "norm_eps": config.get("rms_norm_eps", Epsilon, 1e-6),
            "activation": read_activation(config, "hidden_act", "silu"),
            "tie_embeddings": config.get("tie_word_embeddings", bool, False),
            "init_std": config.get("initializer_range", Amount, 0.02),
            "bos_token": _first(special_tokens(config, "bos_token_id", vocab)),
            "pad_token": _first(special_tokens(config, "pad_token_id", vocab)),
            "eos_tokens": special_tokens(config, "eos_token_id", vocab),
        }
        for key, name, cls in OWN:
            if key in config:
                fields[name] = decode(config.values[key], cls, where=key)
        fields["head_gates"] = config.get(HEAD_GATES, HeadGates, ())
        fields |= self.read_ropes(config, head_dim)
        return DecoderConfig(**(fields | self.extras(config)))

    def read_ropes(self, config: Settings, head_dim: int) -> dict[str, Any]:
        """`rope` (and `local_rope`) of a config, and `max_positions` under scaling."""
        theta = config.get("rope_theta", PositiveReal, self.theta)
        settings = rope_settings(config)
        rope = read_rope(settings, config, head_dim=head_dim, theta=theta)
        self.check_rotated(rope)
        return {"rope": rope} | self.read_reach(rope, settings, config)

    def check_rotated(self, rope: Rope) -> None:
        """All channels are rotated, where the family stores nothing else."""
        if rope.width != rope.head_dim and not self.partial_rotary:
            raise ValueError(
                f"{self.model_type!r} rotates all channels; got partial rotation of "
                f"{rope.width} in head_dim={rope.head_dim}."
            )

    def read_reach(
        self, rope: Rope, settings: Settings, config: Settings
    ) -> dict[str, int]:
        """`max_positions`: what a config says, or what its scaling adds to it."""
        limit = config.get("max_position_embeddings", Positive, 2048)
        extends = self.linear_extends
        return {"max_positions": reach(rope, settings, limit, extends=extends)}

    def write(self, config: DecoderConfig, dtype: str) -> dict[str, Any]:
        """`config.json` that transformers 4 and 5 load."""
        theta, scaling, limit = write_rope(
            config.rope, config.max_positions, extends=self.linear_extends
        )
        eos = list(config.eos_tokens)
        out = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": limit,
            "rms_norm_eps": config.norm_eps,
            "hidden_act": ACTIVATION_NAMES[config.activation],
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "bos_token_id": config.bos_token,
            "pad_token_id": config.pad_token,
            "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
            "torch_dtype": dtype,
        }
        if config.evictor is not None:
            out[EVICTOR] = dataclasses.asdict(config.evictor)
        if config.projection is not None:
            out[PROJECTION] = dataclasses.asdict(config.projection)
        if config.head_gates:
            out[HEAD_GATES] = [list(row) for row in config.head_gates]
        return out | self.write_extras(config)

    def weights(self, config: DecoderConfig) -> dict[str, Weight]:
        """Checkpoint tensor name to decoder parameters, in checkpoint order."""
        out = {"model.embed_tokens.weight": Weight(paths=("embedding",))}
        for index in range(config.num_layers):
            for name, weight in self.layer_weights(config).items():
                paths = tuple(f"layers.{path}" for path in weight.paths)
                out[f"model.layers.{index}.{name}"] = dataclasses.replace(
                    weight, paths=paths, layer=index
                )
        out["model.norm.weight"] = Weight(paths=("norm.weight",))
        if not config.tie_embeddings:
            out["lm_head.weight"] = Weight(paths=("head.kernel",), transpose=True)
        return out

    def layer_weights(self, config: DecoderConfig) -> dict[str, Weight]:
        """The tensors of one layer, both sides without the layer's prefix."""
        out: dict[str, Weight] = {}
        for name in "qkvo":
            bias = config.o_bias if name == "o" else config.qkv_bias
            out |= linear(f"self_attn.{name}_proj", f"attention.{name}", bias=bias)
        if config.qk_norm:
            out |= norm("self_attn.q_norm", "attention.q_norm")
            out |= norm("self_attn.k_norm", "attention.k_norm")
        if config.evictor is not None and config.evictor.kind == "mlp":
            for name in ("up", "down"):
                where = f"retention.{name}"
                out |= linear(f"self_attn.{where}", f"attention.{where}", bias=True)
        for side in config.projection.sides if config.projection else ():
            paths = (f"attention.{side}_basis",)
            out[f"self_attn.{side}_basis"] = Weight(paths=paths)
        for name in ("gate", "up", "down"):
            out |= linear(f"mlp.{name}_proj", f"mlp.{name}", bias=config.mlp_bias)
        out |= norm("input_layernorm", "attention_norm")
        if config.post_norms:
            out |= norm("post_attention_layernorm", "post_attention_norm")
            out |= norm("pre_feedforward_layernorm", "mlp_norm")
            return out | norm("post_feedforward_layernorm", "post_mlp_norm")
        return out | norm("post_attention_layernorm", "mlp_norm")

    def _refuse(self, config: Mapping[str, Any]) -> None:
        check_settings(config.get("quantization_config"))
        active = [
            name
            for name in _REFUSED
            if name not in self.reads and not _off(name, config.get(name))
        ]
        if active:
            found = {name: config[name] for name in active}
            raise ValueError(
                f"{self.model_type!r} does not support these settings: {shown(found)}. "
                f"They change the model's numbers; expected them absent or off."
            )


def _off(name: str, value: Any) -> bool:
    neutral = name.endswith(("multiplier", "scale", "scaling")) and value == 1
    return neutral or not value


def linear(name: str, *paths: str, bias: bool) -> dict[str, Weight]:
    """Kernel and bias of a projection; several `paths` are stored as one."""
    kernels = tuple(f"{path}.kernel" for path in paths)
    out = {f"{name}.weight": Weight(paths=kernels, transpose=True)}
    if bias:
        out[f"{name}.bias"] = Weight(paths=tuple(f"{path}.bias" for path in paths))
    return out


def norm(name: str, path: str) -> dict[str, Weight]:
    """Weight of a norm."""
    return {f"{name}.weight": Weight(paths=(f"{path}.weight",))}


def read_activation(config: Settings, name: str, default: str) -> str:
    """Our name of the activation that a setting names."""
    known = Annotated[str, OneOf(*_ACTIVATIONS)]
    return _ACTIVATIONS[config.get(name, known, default)]


def special_tokens(config: Settings, name: str, vocab_size: int) -> tuple[int, ...]:
    """The ids of a setting (one or a list) that are tokens of the model.

    Published checkpoints name ids that their vocabulary does not have, -1 for none;
    these are left out, which is said.
    """
    value = config.values.get(name)
    many = isinstance(value, list | tuple)
    ids = config.get(name, tuple[int, ...] if many else int, ())
    ids = ids if isinstance(ids, tuple) else (ids,)
    known = tuple(token for token in ids if 0 <= token < vocab_size)
    if known != ids and ids != (-1,):
        _say_left_out(name, shown(value), vocab_size)
    return known


@functools.cache  # a config is read again and again, and this is said once
def _say_left_out(name: str, value: str, vocab_size: int) -> None:
    LOG.warning(
        "`%s` is %s: ids outside of the vocabulary of %d are left out.",
        name,
        value,
        vocab_size,
    )


def _first(tokens: tuple[int, ...]) -> int | None:
    return tokens[0] if tokens else None
