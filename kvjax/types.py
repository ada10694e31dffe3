"""Array aliases, per-layer records and small helpers shared by every rung above.

One alphabet for shapes (docs/architecture.md): `B` batch, `L` layers, `H` query
heads, `K` KV heads, `G` = H // K, `T` tokens of this call, `S` cache slots, `N`
context length, `D` head dim, `E` model dim, `P` pages, `V` vocabulary.
"""

import dataclasses
import difflib
import typing
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.depth import Depth, Loop, plan
from kvjax.rope import Rope

Queries = Float[Array, "B H T D"]
Keys = Float[Array, "B K S D"]
Values = Float[Array, "B K S D"]
Positions = Int[Array, "B K S"]
Scores = Float[Array, "B K S"]
Lengths = Int[Array, "B"]
Tokens = Int[Array, "B T"]
TokensLike = Int[Array | np.ndarray, "B T"]
"""What callers may pass; functions turn it into `Tokens`."""
LengthsLike = Int[Array | np.ndarray, "B"]

EMPTY = -1
"""Position of a slot that holds nothing."""

NEG_INF = float("-inf")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@typing.dataclass_transform(
    frozen_default=True,
    kw_only_default=True,
    field_specifiers=(dataclasses.field, static),
)
def pytree[T](cls: type[T]) -> type[T]:
    """Make a frozen keyword-only dataclass that is a pytree (`static()` aside)."""
    return jax.tree_util.register_dataclass(
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What attention needs to know about one decoder layer; hashable, no arrays.

    Not its number: layers of one kind are one loop (`kvjax.depth`).

    Attributes:
        num_layers: layers of the whole model.
        num_heads: query heads `H`.
        num_kv_heads: key/value heads `K`.
        head_dim: `D`.
        scale: factor on `q . k`, usually `1 / sqrt(D)`.
        rope: rotary embedding of this layer.
        window: sliding window in tokens (a query at `p` sees `p - window < j <= p`),
            or None for full causal attention.
        softcap: `cap * tanh(logit / cap)` on attention logits, or None.
        head_ranks: place of each KV head among all those of the model by its need of
            the whole context, 0 first; empty where the model does not say.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope
    window: int | None = None
    softcap: float | None = None
    head_ranks: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """Query heads per KV head, `G`."""
        return self.num_heads // self.num_kv_heads

    @property
    def kind(self) -> "LayerSpec":
        """What layers that compute the same have in common."""
        return dataclasses.replace(self, head_ranks=())


def loops_of(
    specs: Sequence[LayerSpec], kinds: Sequence[Hashable] = ()
) -> tuple[Loop, ...]:
    """Loops over layers that are alike, in themselves and in what is done with them.

    Args:
        specs: of all layers.
        kinds: of all layers, what is done; empty: the same in all.
    """
    kinds = kinds or (None,) * len(specs)
    alike = [(spec.kind, kind) for spec, kind in zip(specs, kinds, strict=True)]
    return plan(alike)


@pytree
class LayerInputs:
    """What one decoder layer hands to attention.

    `q` and `k` are after q/k norm and RoPE, before the `scale` of the layer.
    Padding tokens have `positions == EMPTY`; what they hold is never read.
    `retention` is what a model with an `Evictor` says of its tokens: below 0 they may
    be evicted, and the higher the longer they stay; None without one.
    `key_basis` (before RoPE) and `value_basis` belong to a model with a `Projection`:
    each head's vectors, the most important first, orthonormal only after a QR.
    `depth` says which layer it is; scores and budgets may look things up by it.
    """

    q: Float[Array, "B H T D"]
    k: Float[Array, "B K T D"]
    v: Float[Array, "B K T D"]
    positions: Int[Array, "B T"]
    o_proj: Float[Array, "H D E"]
    retention: Float[Array, "B K T"] | None = None
    key_basis: Float[Array, "K D D"] | None = None
    value_basis: Float[Array, "K D D"] | None = None
    depth: Depth = Depth()
    spec: LayerSpec = static()


def group_queries(q: Float[Array, "B H T D"], kv_heads: int) -> Array:
    """`[B H T D]` to `[B K G T D]`: query heads beside the KV head they read."""
    b, h, t, d = q.shape
    return q.reshape(b, kv_heads, h // kv_heads, t, d)


def padded_positions(lengths: Lengths, width: int) -> Int[Array, "B T"]:
    """`0 .. lengths-1` in each right-padded row, `EMPTY` behind it."""
    index = jnp.arange(width, dtype=jnp.int32)[None, :]
    return jnp.where(index < lengths[:, None], index, EMPTY)


def nbytes(tree: object) -> int:
    """Bytes of all array leaves; works on arrays and on `ShapeDtypeStruct`s."""
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree)
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
