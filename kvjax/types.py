"""Array aliases, per-layer records and small helpers shared by every rung above.

One alphabet for shapes (docs/architecture.md): `B` batch, `L` layers, `H` query
heads, `K` KV heads, `G` = H // K, `T` tokens of this call, `S` cache slots, `N`
context length, `D` head dim, `E` model dim, `P` pages, `V` vocabulary.
"""

import dataclasses
import typing
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.depth import Depth, Loop, plan
from kvjax.rope import Rope

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

NEVER = np.iinfo(np.int32).max
"""A position behind all others."""

NEG_INF = float("-inf")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


PYTREES: list[type] = []
"""What `pytree` has made."""


@typing.dataclass_transform(
    frozen_default=True,
    kw_only_default=True,
    field_specifiers=(dataclasses.field, static),
)
def pytree[T](cls: type[T]) -> type[T]:
    """Make a frozen keyword-only dataclass that is a pytree (`static()` aside).

    Files of caches can hold it.
    """
    made = jax.tree_util.register_dataclass(
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    )
    PYTREES.append(made)
    return made


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
    specs: Sequence[LayerSpec], *kinds: Sequence[Hashable]
) -> tuple[Loop, ...]:
    """Loops over layers that are alike, in themselves and in what is done with them.

    Args:
        specs: of all layers.
        kinds: of all layers, what is done or what there is; empty: the same in all.
    """
    given = (each for each in kinds if each)
    return plan(list(zip((spec.kind for spec in specs), *given, strict=True)))


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
    `elsewhere` is the log-sum-exp of what the queries pay to tokens that are not among
    those held, of a shared prefix say; None: there are none.
    """

    q: Float[Array, "B H T D"]
    k: Float[Array, "B K T D"]
    v: Float[Array, "B K T D"]
    positions: Int[Array, "B T"]
    o_proj: Float[Array, "H D E"]
    retention: Float[Array, "B K T"] | None = None
    key_basis: Float[Array, "K D D"] | None = None
    value_basis: Float[Array, "K D D"] | None = None
    elsewhere: Float[Array, "B H T"] | None = None
    depth: Depth = Depth()
    spec: LayerSpec = static()

    def taken(
        self, index: Int[Array, "B W"], live: Bool[Array, "B W"]
    ) -> "LayerInputs":
        """The tokens at `index` of each row; padding where not `live`."""

        def take(x: Array) -> Array:
            at = index[:, None].reshape(*index[:, None].shape, *(1,) * (x.ndim - 3))
            return jnp.take_along_axis(x, at, axis=2)

        positions = jnp.take_along_axis(self.positions, index, axis=1)
        given = {
            name: take(getattr(self, name))
            for name in ("q", "k", "v", "retention", "elsewhere")
            if getattr(self, name) is not None
        }
        positions = jnp.where(live, positions, EMPTY)
        return dataclasses.replace(self, positions=positions, **given)

    def held(self, seen: Lengths) -> "Held":
        """The tokens themselves, where they are all that there are.

        Args:
            seen: tokens of each row.
        """
        rows = (self.k, self.v, self.positions, seen)
        return Held.of_rows(*rows, layer=self.depth.layer, spec=self.spec)


@pytree
class Held:
    """Tokens that a layer holds, in any order; after what `LayerInputs` asked.

    A slot is free where `positions == EMPTY`, and may then hold anything. Heads may
    hold different tokens, unless they are `in_order`.

    Attributes:
        k, v: keys after RoPE, and values.
        positions: absolute positions.
        seen: tokens that each row has seen, one more than its newest position.
        layer: number of the layer, from 0.
        spec: of the layer.
        in_order: whether all heads hold the same tokens, by position, free slots last.
    """

    k: Keys
    v: Values
    positions: Positions
    seen: Lengths
    layer: Int[Array, ""] | int = 0
    spec: LayerSpec = static()
    in_order: bool = static(default=False)

    @classmethod
    def of_rows(
        cls,
        k: Keys,
        v: Values,
        positions: Int[Array, "B S"],
        seen: Lengths,
        *,
        layer: Int[Array, ""] | int,
        spec: LayerSpec,
    ) -> "Held":
        """Rows of tokens that all heads hold, in order and right-padded."""
        return cls(
            k=k,
            v=v,
            positions=jnp.broadcast_to(positions[:, None], k.shape[:3]),
            seen=seen,
            layer=layer,
            spec=spec,
            in_order=True,
        )

    @property
    def live(self) -> Bool[Array, "B K S"]:
        """Which slots hold a token."""
        return self.positions >= 0

    def cleared(self) -> "Held":
        """With zeros in free slots: what those hold must not reach a sum."""
        live = self.live[..., None]
        k, v = (jnp.where(live, x, 0) for x in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)


def padded_positions(
    lengths: Lengths, width: int, before: Any = 0
) -> Int[Array, "B T"]:
    """`before .. before+lengths-1` in each right-padded row, `EMPTY` behind it.

    Args:
        lengths: tokens of each row.
        width: of the rows.
        before: tokens in front of them, one number or `[B, 1]`.
    """
    index = jnp.arange(width, dtype=jnp.int32)[None, :]
    return jnp.where(index < lengths[:, None], index + before, EMPTY)


def nbytes(tree: object) -> int:
    """Bytes of all array leaves; works on arrays and on `ShapeDtypeStruct`s."""
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree)
    )


def nbytes_once(tree: object) -> int:
    """Bytes of all array leaves, of one that is there several times once."""
    return nbytes(list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()))
