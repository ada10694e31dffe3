"""Blocks by the keys of the tokens that were looked at most (InfLLM)."""

import dataclasses
from typing import ClassVar, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.cache import Landmarks, levelled
from kvjax.config import sized
from kvjax.fields import Count, Positive, Size
from kvjax.reads.base import AbstractBudgeted


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class InfLLM(AbstractBudgeted):
    """The blocks whose representatives a query is most alike; nothing is dropped.

    Representatives of a block are its tokens that received most attention; blocks are
    ranked by the product of the query with the mean of their keys, summed over the
    group. The first tokens and the last ones in front of a query are always read,
    beside the budget. Later blocks have all of their tokens as representatives, since
    nothing remembers what these received.

    Attributes:
        size: tokens of a block.
        representatives: tokens that stand for a block of the prompt.
        sinks: first tokens of a row, of which whole blocks are always read.
        local: last tokens in front of a query, likewise.

    Source: InfLLM (2402.04617) and its repository at 12b7079 (blocks of 128, 4
    representatives, 16 blocks, 128 sinks, 4096 local).
    Deviations: attention is that of all later queries of the prompt, not of the local
    window alone; each KV head chooses its own blocks, and each query (there all heads
    together, 512 queries at a time); keys keep their positions, where the paper gives
    all far tokens one distance; prompts are read densely. `store.place` says where
    blocks lie, there in the host's memory.
    """

    size: Size = sized(128, short=8)
    representatives: Positive = 4
    sinks: Count = sized(128, short=8)
    local: Count = sized(4096, short=16, recent=True)
    needs_mass: ClassVar[bool] = True

    @property
    def block(self):
        return self.size

    @property
    def page(self):
        return self.size

    def observe(self, asked, held, mass):
        assert mass is not None
        b, h, s = mass.shape
        kv_heads = asked.spec.num_kv_heads
        received = jnp.sum(mass.reshape(b, kv_heads, h // kv_heads, s), axis=2)
        return levelled(jnp.where(held.live, received, -jnp.inf))

    def index(self, part, exact, seen, spec):
        del exact
        assert part.filled is not None
        keys = part.keys.decode(part.positions, spec.rope)
        received = jnp.where(part.positions >= 0, seen, -jnp.inf)
        marked = Landmarks(
            keys=part.keys,
            values=part.values,
            positions=part.positions,
            filled=part.filled,
            page=self.size,
            landmark=represented(keys, received, self.size, self.representatives),
            budget=self.budget,
            group="sum",
            sinks=self.sinks,
            local=self.local,
        )
        return (marked,)


def represented(
    keys: Float[Array, "B K S D"],
    received: Float[Array, "B K S"],
    size: int,
    count: int,
) -> Float[Array, "B K P D"]:
    """Of each block the mean key of the `count` tokens that received most.

    `-inf` is received by what is not there; a block of nothing else has 0.
    """
    b, kv_heads, s, d = keys.shape
    paged = received.reshape(b, kv_heads, s // size, size)
    best, index = jax.lax.top_k(jax.lax.stop_gradient(paged), min(count, size))
    there = (best > -jnp.inf)[..., None]
    blocks = keys.reshape(b, kv_heads, s // size, size, d)
    chosen = jnp.take_along_axis(blocks, index[..., None], axis=3)
    total = jnp.sum(jnp.where(there, chosen, 0), axis=3, dtype=jnp.float32)
    some = jnp.maximum(jnp.sum(there, axis=3, dtype=jnp.float32), 1)
    return (total / some).astype(keys.dtype)
