"""From priorities and budgets to the prompt tokens in each slot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.types import NEG_INF, Scores


class Choice(NamedTuple):
    """Prompt tokens of the slots of every head, in position order.

    Attributes:
        index: `[B, K, C]` prompt token of each slot; anything where not `live`.
        live: `[B, K, C]` slots that hold a token; they come first.
    """

    index: Int[Array, "B K C"]
    live: Bool[Array, "B K C"]


class FlatChoice(NamedTuple):
    """Tokens of a layer's flat buffer, by head and then by position.

    Attributes:
        head: `[B, N]` KV head of each slot.
        index: `[B, N]` prompt token of each slot.
        live: `[B, N]` slots that hold a token; they come first.
        offsets: `[B, K + 1]` first slot of each head, and the end.
    """

    head: Int[Array, "B N"]
    index: Int[Array, "B N"]
    live: Bool[Array, "B N"]
    offsets: Int[Array, "B K+1"]


def top(
    priorities: Float[Array, "*lead S"], counts: Int[Array, "*lead"], capacity: int
) -> tuple[Array, Array]:
    """The `counts` highest priorities in index order, and which slots are live.

    Ties go to the lower index; `-inf` is never taken.
    """
    s = priorities.shape[-1]
    width = min(capacity, s)
    value, index = jax.lax.top_k(jax.lax.stop_gradient(priorities), width)
    taken = (jnp.arange(width) < counts[..., None]) & (value > NEG_INF)
    ordered = jnp.sort(jnp.where(taken, index, s), axis=-1)
    if capacity > s:
        pad = [(0, 0)] * (ordered.ndim - 1) + [(0, capacity - s)]
        ordered = jnp.pad(ordered, pad, constant_values=s)
    return jnp.minimum(ordered, s - 1).astype(jnp.int32), ordered < s


def choose(priorities: Scores, counts: Int[Array, "B"], capacity: int) -> Choice:
    """The best `counts[b]` tokens of every head, in `capacity` slots."""
    per_head = jnp.broadcast_to(counts[:, None], priorities.shape[:2])
    return Choice(*top(priorities, per_head, capacity))


def head_counts(
    priorities: Scores, sure: Int[Array, "B K"], total: Int[Array, "B"], capacity: int
) -> Int[Array, "B K"]:
    """Slots of each head, where the heads of a layer share `total` of them.

    Each first gets its own best `sure[b, k]` tokens; the rest goes to the best of all
    heads.

    Args:
        priorities: of all tokens; `-inf` gets no slot.
        sure: slots that each head surely gets.
        total: slots of all heads together.
        capacity: the largest `total` of any row.
    """
    b, kv_heads, s = priorities.shape
    safe = (ranks(priorities) < sure[..., None]) & (priorities > NEG_INF)
    guarded = jnp.where(safe, jnp.inf, priorities)
    index, live = top(guarded.reshape(b, -1), total, capacity)
    owner = jnp.where(live, index // s, kv_heads)
    mine = owner[:, None, :] == jnp.arange(kv_heads)[:, None]
    return jnp.sum(mine, axis=-1, dtype=jnp.int32)


def ranks(priorities: Scores) -> Int[Array, "B K S"]:
    """0 for the best token of each head; ties go to the lower index."""
    order = jnp.argsort(-priorities, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)


def choose_flat(
    priorities: Scores, heads: Int[Array, "B K"], capacity: int
) -> FlatChoice:
    """The best `heads[b, k]` tokens of each head, in `capacity` slots for all."""
    b, kv_heads, s = priorities.shape
    kept = (ranks(priorities) < heads[..., None]) & (priorities > NEG_INF)
    counts = jnp.cumsum(kept.reshape(b, -1), axis=-1)
    slot = jnp.arange(1, capacity + 1)
    # The token of slot `n` is where the count gets there.
    at = jax.vmap(lambda count: jnp.searchsorted(count, slot))(counts)
    live = slot <= counts[:, -1:]
    at = jnp.minimum(at, kv_heads * s - 1)
    ends = counts[:, s - 1 :: s]
    offsets = jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends], axis=-1)
    offsets = jnp.minimum(offsets, capacity).astype(jnp.int32)
    return FlatChoice(at // s, at % s, live, offsets)


def chosen_mask(
    choice: Choice | FlatChoice, live: Bool[Array, "B K S"]
) -> Bool[Array, "B K S"]:
    """Which of all tokens were chosen."""
    b, kv_heads, s = live.shape
    if isinstance(choice, FlatChoice):
        at = (jnp.arange(b)[:, None], choice.head)
    else:
        at = (jnp.arange(b)[:, None, None], jnp.arange(kv_heads)[:, None])
    index = jnp.where(choice.live, choice.index, s)
    return jnp.zeros_like(live).at[(*at, index)].set(True, mode="drop")


def take(x: Float[Array, "B K S D"], choice: Choice) -> Float[Array, "B K C D"]:
    """Keys or values of the chosen tokens; 0 in free slots."""
    picked = jnp.take_along_axis(x, choice.index[..., None], axis=2)
    return jnp.where(choice.live[..., None], picked, 0)


def take_flat(x: Float[Array, "B K S D"], choice: FlatChoice) -> Float[Array, "B N D"]:
    """Keys or values of the chosen tokens in the flat buffer; 0 in free slots."""
    b, kv_heads, s, d = x.shape
    flat = x.reshape(b, kv_heads * s, d)
    at = choice.head * s + choice.index
    picked = jnp.take_along_axis(flat, at[..., None], axis=1)
    return jnp.where(choice.live[..., None], picked, 0)
