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


def choose_flat(
    priorities: Scores,
    sure: Int[Array, "B K"],
    counts: Int[Array, "B"],
    capacity: int,
) -> FlatChoice:
    """The best `counts[b]` tokens of a layer, in `capacity` slots for all heads.

    Each head first gets its own best `sure[b, k]`.
    """
    b, kv_heads, s = priorities.shape
    order = jnp.argsort(-priorities, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    safe = (rank < sure[..., None]) & (priorities > NEG_INF)
    guarded = jnp.where(safe, jnp.inf, priorities)
    index, live = top(guarded.reshape(b, -1), counts, capacity)
    head = index // s
    owner = jnp.where(live, head, kv_heads)
    edges = jnp.arange(kv_heads + 1)
    offsets = jnp.sum(owner[:, None, :] < edges[None, :, None], axis=-1)
    return FlatChoice(head, index % s, live, offsets.astype(jnp.int32))


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
