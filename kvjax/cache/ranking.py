"""What ranks the tokens that are held, whenever that is asked for.

Scores that differ by rounding alone are equal, and of equal scores the older token
stays. A token that comes twice, for instance, has keys of one length in the first
layer, and what RoPE's rounding leaves of that says nothing; nor must the rest of a
batch, whose shape decides in which order sums are taken. Scores are equal where they
are within `ROUNDING` of each other, or joined by others that are: a grid would part
what lies on both sides of an edge. That is done here, to what is compared:
`levelled` for a whole prompt, `nearly` for a token that is decoded.

Rounding of keys and values themselves is no tie: those of a bfloat16 model are held
as they were rounded, a hundredth of their size apart.
"""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.types import Held, LayerInputs, Scores, pytree

ROUNDING = 2.0**-20
"""Of their size, what equal scores differ by: a few roundings of float32."""


@pytree
class Memory:
    """What a ranking remembers of what was asked.

    Attributes:
        slots: of every token held, leaves `[B, K, S, ...]`: it moves with the tokens.
        row: of every row, leaves `[B, ...]`.
    """

    slots: Any = ()
    row: Any = ()


class AbstractRanking(abc.ABC):
    """Ranks what is held by what was asked: of the whole prompt, a chunk, a token.

    Queries come in order, in pieces of any size, and are not seen again: what the
    scores need of them is remembered (`kvjax.compress.observe.remember`). Memory keeps
    its structure, shapes and dtypes, but for the number of slots. Everything goes by
    absolute positions; a slot's number means nothing.
    """

    exact: ClassVar[bool] = False
    """Whether no rounding is in its scores, so that none of them are levelled."""

    needs_mass: ClassVar[bool] = False
    """Whether it wants what each token held receives of every query's attention."""

    per_head: ClassVar[bool] = False
    """Whether the scores of a head follow from what that head alone asked and holds,
    and nothing is remembered of rows: then heads may be on several devices."""

    def tokens(self, asked: LayerInputs) -> Any:
        """What is remembered of new tokens themselves, leaves `[B, K, T, ...]`.

        Args:
            asked: the new tokens; padding, at `EMPTY`, may hold anything.
        """
        del asked
        return ()

    def row(self, asked: LayerInputs, before: Any) -> Any:
        """What is remembered of the queries of each row, leaves `[B, ...]`.

        Args:
            asked: the new tokens.
            before: the same of the tokens before them; None: there were none.
        """
        del asked, before
        return ()

    def received(self, slots: Any, mass: Float[Array, "B H S"]) -> Any:
        """`Memory.slots` after tokens received attention; if it `needs_mass`.

        Args:
            slots: before that.
            mass: softmax weight of each token held, summed over the new queries.
        """
        del mass
        return slots

    @abc.abstractmethod
    def score(self, memory: Memory, held: Held, counts: Int[Array, "B"]) -> Scores:
        """Scores of what is held: the higher, the longer it stays; `+inf` always.

        Args:
            memory: of all queries so far.
            held: the tokens, with those that asked last among them.
            counts: tokens per head that will be kept.

        Returns:
            Of free slots anything.
        """

    def ranked(self, memory: Memory, held: Held, counts: Int[Array, "B"]) -> Scores:
        """`score`, or what rises with it: for tokens that are compared, not weighed.

        Of use where a score underflows and its logarithm does not.
        """
        return self.score(memory, held, counts)

    def unprotected(self, memory: Memory, held: Held, scores: Scores) -> Scores:
        """Finite scores: those of tokens that always stay as if they did not.

        Args:
            memory: as `score` got it.
            held: the tokens.
            scores: what `score` said of them.

        Returns:
            Of free slots anything. Where a ranking does not know better, protected
            tokens have the largest finite score of their head.
        """
        del memory
        return finite(held, scores)


def finite(held: Held, scores: Scores) -> Scores:
    """Scores in which tokens that always stay have the largest number of their head.

    Tokens that never stay have the smallest.
    """
    known = held.live & jnp.isfinite(scores)
    most = jnp.max(jnp.where(known, scores, -jnp.inf), axis=-1, keepdims=True)
    least = jnp.min(jnp.where(known, scores, jnp.inf), axis=-1, keepdims=True)
    some = jnp.isfinite(most)
    most, least = jnp.where(some, most, 1.0), jnp.where(some, least, 0.0)
    return jnp.where(known, scores, jnp.where(jnp.isposinf(scores), most, least))


def places(scores: Scores, held: Held) -> Int[Array, "B K S"]:
    """0 for the best token of each head; of equals the oldest comes first."""
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    keys = (-levelled(scores), held.positions, index)
    order = jax.lax.sort(keys, num_keys=2)[2]
    return jnp.argsort(order, axis=-1)


def nearly(x: Array) -> Array:
    """How far from `x` its equals are; 0 of what is not finite."""
    return jnp.where(jnp.isfinite(x), ROUNDING * jnp.abs(x), 0.0)


@jax.custom_jvp
def levelled(scores: Float[Array, "*lead S"]) -> Float[Array, "*lead S"]:
    """Scores of which those that are equal up to rounding are the same number.

    Each is the smallest of its equals. Their gradient is that of the scores.

    Cost: two sorts along the last axis.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    value, index = jax.lax.sort((scores, index), num_keys=1, is_stable=True)
    before = jnp.concatenate([value[..., :1], value[..., :-1]], axis=-1)
    near = jnp.maximum(nearly(value), nearly(before))
    # inf less inf is NaN, which is no greater than anything.
    first = (value - before > near) | (jnp.isfinite(value) != jnp.isfinite(before))
    low = jnp.where(first, value, -jnp.inf).at[..., 0].set(value[..., 0])
    low = jax.lax.cummax(low, axis=low.ndim - 1)
    return jax.lax.sort((index, low), num_keys=1, is_stable=True)[1]


@levelled.defjvp
def _levelled_jvp(primals, tangents):
    return levelled(*primals), tangents[0]
