"""Pages that are ranked by what a query makes of them, and read up to a budget."""

import abc
import dataclasses
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import exact
from kvjax.cache.selecting import AbstractSelecting
from kvjax.pallas_kernels.slots import slot_logits
from kvjax.turns import Turn, take
from kvjax.types import EMPTY, NEVER, LayerSpec, static


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageBudget:
    """How many of the held pages a query reads. Exactly one field is set.

    Attributes:
        keep: fraction of the held pages, rounded up.
        pages: number of pages.
    """

    keep: float | None = None
    pages: int | None = None

    def read(self, held: Int[Array | np.ndarray, "..."]) -> Any:
        """Pages to read of `held` ones, NumPy or traced: at least 1."""
        xp = exact.namespace(held)
        held = xp.maximum(xp.asarray(held, np.int32), 1)
        if self.keep is not None:
            return exact.ceil_share(held, self.keep)
        assert self.pages is not None
        return xp.minimum(held, min(self.pages, exact.LONGEST))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractPages(AbstractSelecting):
    """Pages of which the best ones are read; `budget` says how many."""

    budget: PageBudget = static()

    spares: ClassVar[bool] = False
    """Whether pages that are always read are beside the budget, not within it."""

    @abc.abstractmethod
    def ranked(
        self,
        q: Float[Array, "B H T D"],
        q_positions: Int[Array, "B T"],
        first: Int[Array, "B K P"],
        last: Int[Array, "B K P"],
        seen: Bool[Array, "B K T P"],
        spec: LayerSpec,
        turn: Turn,
    ) -> Float[Array, "B K T P"]:
        """How much each query wants each page, `+inf` where it is always read.

        Args:
            q: see `attend`.
            q_positions: likewise.
            first: oldest position of each page.
            last: newest one.
            seen: pages that the query sees something of; elsewhere anything will do.
            spec: see `attend`.
            turn: likewise.
        """

    def always(self, pages: int) -> int:
        """The most of so many pages that are always read."""
        del pages
        return 0

    @property
    def most(self):
        pages = self.slots // self.page
        return most_pages(self.budget, pages, self.always(pages))

    def select(self, q, q_positions, spec, limit=None, turn=None):
        q = jax.lax.stop_gradient(q)  # a choice has none
        first, last = spans(take(self.positions, turn), self.page)
        seen = self.seen(first, last, q_positions, limit, spec)
        score = self.ranked(q, q_positions, first, last, seen, spec, turn)
        score = jnp.where(seen, score, -jnp.inf)
        best, index = jax.lax.top_k(score, self.most)
        allowed = self.budget.read(self.held(limit, turn) // self.page)
        allowed = allowed[:, None, :, None]
        if self.spares:
            allowed = allowed + jnp.sum(jnp.isposinf(score), axis=-1, keepdims=True)
        read = (jnp.arange(self.most) < allowed) & (best > -jnp.inf)
        return index, read


def most_pages(budget: PageBudget, pages: int, always: int = 0) -> int:
    """The most that is read of up to `pages` pages, `always` beside the budget."""
    return min(max(pages, 1), int(budget.read(np.array(pages))) + always)


def spans(
    positions: Int[Array, "B K S"], page: int
) -> tuple[Int[Array, "B K P"], Int[Array, "B K P"]]:
    """Oldest and newest position of each page; `NEVER` and `EMPTY` of an empty one."""
    b, kv_heads, s = positions.shape
    paged = positions.reshape(b, kv_heads, s // page, page)
    first = jnp.min(jnp.where(paged >= 0, paged, NEVER), axis=-1)
    return first, jnp.max(jnp.where(paged >= 0, paged, EMPTY), axis=-1)


def log_shares(
    q: Float[Array, "B H T D"],
    summary: Float[Array, "B K X D"],
    seen: Bool[Array, "B K T X"],
    spec: LayerSpec,
) -> Float[Array, "B K G T X"]:
    """Logarithm of each query head's softmax weights over what it sees; else `-inf`.

    Logarithms rank what underflows, too.
    """
    logits = slot_logits(q, summary, scale=spec.scale, softcap=spec.softcap)
    logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return logits - jnp.where(jnp.isneginf(total), 0.0, total)
