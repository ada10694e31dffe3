"""Contract of scorers: how valuable is a token, per KV head?"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvjax.cache import AbstractRanking
from kvjax.fields import Checked
from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.slots import attend_block, slot_mask, slot_mass
from kvjax.types import Held, Keys, LayerInputs, Lengths, Scores, Values, pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractScorer(Checked, AbstractRanking):
    """A ranking that is published as a method; holds hyper-parameters only.

    It serves a whole prompt, a prompt in pieces and tokens that are decoded alike.
    """

    needs_retention: ClassVar[bool] = False
    """Whether the model must have an evictor (`LayerInputs.retention`)."""

    probes: ClassVar[bool] = False
    """Whether it runs the model over the prompt again: an `AbstractProbe`."""

    @property
    def protected(self) -> int:
        """Tokens that are kept whatever their score: budgets must not be below it."""
        return 0

    def validate(self, longest: int, vocab_size: int, max_positions: int) -> None:
        """Raise `ValueError` if a model cannot score a prompt.

        Args:
            longest: tokens of the longest prompt.
            vocab_size: of the model.
            max_positions: of the model.
        """
        del longest, vocab_size, max_positions


class Replayed(NamedTuple):
    """What tokens behind a prompt gave.

    Attributes:
        logits: behind each of them.
        looks: what `look` returned, with a first axis for the layers; or None.
    """

    logits: Float[Array, "B R V"]
    looks: Any


Look = Callable[[LayerInputs, Keys, Values], Any]
"""What is to be known of a layer: `(asked, k, v)` of the new tokens and the prompt."""


@runtime_checkable
class Again(Protocol):
    """The model over some tokens behind a prompt that it has read."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, rows, KV heads and tokens of the prompts: `[L, B, K, S]`."""
        ...

    def __call__(
        self,
        tokens: Int[Array, "B R"],
        positions: Int[Array, "B R"],
        look: Look | None = None,
        gates: Float[Array, "L B K S"] | None = None,
    ) -> Replayed:
        """Each token sees the whole prompt, and those before it.

        Args:
            tokens: right-padded.
            positions: absolute ones, `EMPTY` at padding.
            look: called in every layer.
            gates: what the weight of each token of the prompt is multiplied by, before
                the softmax: 1 as it is, 0 dropped; None: all 1. Differentiable above 0,
                with memory for one layer's attention.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractProbe(AbstractScorer):
    """A score of what a second pass over the prompt does."""

    probes: ClassVar[bool] = True

    @abc.abstractmethod
    def probe(
        self, again: Again, tokens: Int[Array, "B S"], lengths: Lengths
    ) -> Float[Array, "L B K S"]:
        """Scores of all tokens of the prompts in all layers.

        Args:
            again: runs the model behind the prompts.
            tokens: theirs, right-padded.
            lengths: of each row.
        """

    @abc.abstractmethod
    def validate(self, longest, vocab_size, max_positions):
        """As of every score; what stands behind a prompt has to fit as well."""

    def tokens(self, asked):
        return jnp.zeros(asked.k.shape[:3], jnp.float32)  # until it is known

    def score(self, memory, held, counts):
        del held, counts
        return memory.slots


@pytree
class Asking:
    """The last queries of each row, oldest first.

    Attributes:
        q: `[B, H, W, D]` after RoPE.
        positions: `[B, W]`; `EMPTY` in front, where a row had fewer.
        elsewhere: `[B, H, W]`, see `LayerInputs`.
    """

    q: Float[Array, "B H W D"]
    positions: Int[Array, "B W"]
    elsewhere: Float[Array, "B H W"] | None


def last_queries(asked: LayerInputs, window: int, before: Asking | None) -> Asking:
    """The last `window` queries of every row.

    Args:
        asked: the newest ones.
        window: how many.
        before: the last ones before them.
    """
    # The last ones of what was there and what has come, row by row.
    fresh = jnp.sum(asked.positions >= 0, axis=1)
    index = fresh[:, None] + jnp.arange(window)
    if before is None:
        index = index - window
        live = index >= 0
        index = jnp.maximum(index, 0)
        found = asked.taken(index, live)
        return Asking(q=found.q, positions=found.positions, elsewhere=found.elsewhere)

    def last(old: Array, new: Array) -> Array:
        both = jnp.concatenate([old, new], axis=2)
        at = index[:, None].reshape(-1, 1, window, *(1,) * (new.ndim - 3))
        return jnp.take_along_axis(both, at, axis=2)

    elsewhere = before.elsewhere
    if elsewhere is not None:
        assert asked.elsewhere is not None
        elsewhere = last(elsewhere, asked.elsewhere)
    positions = jnp.concatenate([before.positions, asked.positions], axis=1)
    return Asking(
        q=last(before.q, asked.q),
        positions=jnp.take_along_axis(positions, index, axis=1),
        elsewhere=elsewhere,
    )


def mass_received(asking: Asking, held: Held) -> Float[Array, "B H S"]:
    """Softmax weight of each token held, summed over the queries."""
    spec, q, positions = held.spec, asking.q, asking.positions
    how = {"scale": spec.scale, "softcap": spec.softcap}
    if held.in_order and asking.elsewhere is None:
        shared = held.positions[:, 0]
        stats = column_stats(q, held.k, positions, shared, window=spec.window, **how)
        return stats.sum
    return received(asking, held, lambda weights, _: jnp.sum(weights, axis=2))


def received(
    asking: Asking,
    held: Held,
    of: Callable[[Float[Array, "B H T S"], Bool[Array, "B 1 T 1"]], Any],
) -> Any:
    """The sum over chunks of queries of what `of` finds in them; memory as a chunk's.

    Args:
        asking: the queries.
        held: the tokens.
        of: of the softmax weights that queries pay to each token held, 0 at free slots,
            and of which of them are no padding: a pytree of sums over the queries.
    """
    spec = held.spec
    how = {"scale": spec.scale, "softcap": spec.softcap}

    def some(q: Array, positions: Array, *elsewhere: Array) -> tuple[Partial, Any]:
        q = jnp.moveaxis(q, 2, 1)
        mask = slot_mask(positions, held.positions, spec.window)
        block = (q, held.k, held.v[..., :1], mask)
        part = attend_block(*block, in_pieces=True, **how)
        lse = part.lse
        for other in elsewhere:
            lse = jnp.logaddexp(lse, jnp.moveaxis(other, 2, 1))
        weights = slot_mass(q, lse, held.k, mask, **how)
        return part, of(weights, (positions >= 0)[:, None, :, None])

    given = [jnp.moveaxis(asking.q, 1, 2), asking.positions]
    if asking.elsewhere is not None:
        given.append(jnp.moveaxis(asking.elsewhere, 1, 2))
    b, h, queries, _ = asking.q.shape
    chunk = query_chunk(queries, b * h * held.k.shape[2])
    return map_query_chunks(some, chunk, *given)[1]


def group_mean(
    x: Float[Array, "B H *rest"], kv_heads: int
) -> Float[Array, "B K *rest"]:
    """Mean over the query heads that share a KV head."""
    b, h, *rest = x.shape
    return jnp.mean(x.reshape(b, kv_heads, h // kv_heads, *rest), axis=2)


def protect_last(scores: Scores, held: Held, window: int) -> Scores:
    """`+inf` for the newest `window` tokens of each row."""
    recent = held.positions >= (held.seen - window)[:, None, None]
    return jnp.where(recent, jnp.inf, scores)


def protect_first(scores: Scores, held: Held, sinks: int) -> Scores:
    """`+inf` for the first `sinks` tokens."""
    return jnp.where(held.positions < sinks, jnp.inf, scores)


def position_order(held: Held) -> Int[Array, "B K S"] | None:
    """Slots of every head by position, free ones last; None: they are in order."""
    if held.in_order:
        return None
    last = jnp.iinfo(jnp.int32).max
    return jnp.argsort(jnp.where(held.live, held.positions, last), axis=-1)


def by_position(held: Held) -> tuple[Held, Int[Array, "B K S"] | None]:
    """What is held, every head in order of positions, and that order."""
    order = position_order(held)
    if order is None:
        return held, None
    k, v = (jnp.take_along_axis(x, order[..., None], axis=2) for x in (held.k, held.v))
    positions = jnp.take_along_axis(held.positions, order, axis=2)
    return dataclasses.replace(held, k=k, v=v, positions=positions), order


def ordered(
    x: Shaped[Array, "B K S"], order: Int[Array, "B K S"] | None
) -> Shaped[Array, "B K S"]:
    """Something of every slot (a score, a mark) in the order of `position_order`."""
    return x if order is None else jnp.take_along_axis(x, order, axis=-1)


def unsorted(
    x: Shaped[Array, "B K S"], order: Int[Array, "B K S"] | None
) -> Shaped[Array, "B K S"]:
    """What is in the order of `position_order` at the slots themselves."""
    if order is None:
        return x
    return jnp.take_along_axis(x, jnp.argsort(order, axis=-1), axis=-1)


def to_kv_heads(x: Float[Array, "B S"], kv_heads: int) -> Scores:
    """The same scores for every KV head."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], kv_heads, x.shape[-1]))


def row_keys(seed: int, layer: Int[Array, ""] | int, seen: Lengths) -> Array:
    """One random key per row, a function of its length and not of its neighbours."""
    key = jax.random.fold_in(jax.random.key(seed), layer)
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(seen)


def average_pool(x: Array, kernel: int) -> Array:
    """Centred moving average over the last axis, zeros outside and counted."""
    return functools.reduce(jnp.add, _neighbours(x, kernel)) / kernel


def max_pool(x: Array, kernel: int) -> Array:
    """Centred moving maximum over the last axis of what is not negative."""
    return functools.reduce(jnp.maximum, _neighbours(x, kernel))


def _neighbours(x: Array, kernel: int) -> list[Array]:
    """Of each entry those around it, from left to right; zeros outside."""
    left, width = (kernel - 1) // 2, x.shape[-1]
    pad = [(0, 0)] * (x.ndim - 1) + [(left, kernel - 1 - left)]
    padded = jnp.pad(x, pad)
    return [padded[..., i : i + width] for i in range(kernel)]
