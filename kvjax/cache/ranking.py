"""What ranks the tokens that are held, whenever that is asked for."""

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.types import Held, LayerInputs, Scores, pytree


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

    needs_mass: ClassVar[bool] = False
    """Whether it wants what each token held receives of every query's attention."""

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
