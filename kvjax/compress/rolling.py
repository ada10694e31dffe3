"""A cache that is compressed again behind every chunk of a row.

A row is read chunk by chunk. The tokens of a chunk attend to what is held of those
before it and to each other; then they are held too, and of all that is held the best
stay, as many as the budget has slots. So a layer holds no more than its slots between
two chunks and no more than these and a chunk while it reads one, however long the row.

Scores are the same as after a prompt: they see what was asked and what is held, by
absolute positions. What has been dropped is gone. Slots are in the order of positions,
free ones anywhere.

Which tokens stay is said by one bit per token (`kept`), so that a pass can be repeated
with the decisions of the first one: they are then data, and scores are not needed. A
layer in which nothing is dropped has no slots: what it holds grows with the row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt8

from kvjax.cache import Memory
from kvjax.compress.observe import remember
from kvjax.compress.plan import Eviction
from kvjax.compress.priorities import ranked
from kvjax.compress.rolling_plan import Rolling
from kvjax.compress.select import choose, chosen_mask
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.dispatch import partitions
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.types import EMPTY, Held, LayerInputs, Lengths, pytree


@pytree
class Rolled:
    """What a layer holds between two chunks; of several layers, with a first axis.

    Attributes:
        keys: after RoPE.
        values: of the same tokens.
        positions: theirs; a slot is free where `EMPTY`.
    """

    keys: Array  # [*layers, B, K, C, D]
    values: Array  # [*layers, B, K, C, D]
    positions: Array  # [*layers, B, K, C]


def nothing_held(
    asked: LayerInputs, evict: Eviction, slots: int
) -> tuple[Rolled, Memory]:
    """What a layer holds before the first chunk, and what its score remembers.

    Args:
        asked: any tokens of the layer; their shapes count.
        evict: what will rank.
        slots: of a head.
    """
    b, kv_heads, _, d = asked.k.shape
    blank = jnp.zeros((b, kv_heads, slots, d), asked.k.dtype)
    free = jnp.full((b, kv_heads, slots), EMPTY, jnp.int32)
    none = dataclasses.replace(asked, positions=jnp.full_like(asked.positions, EMPTY))
    memory = Memory(
        slots=jax.tree.map(
            lambda x: jnp.zeros((*x.shape[:2], slots, *x.shape[3:]), x.dtype),
            jax.eval_shape(evict.score.tokens, none),
        ),
        row=evict.score.row(none, None),
    )
    return Rolled(keys=blank, values=blank, positions=free), memory


def joined(held: Rolled, asked: LayerInputs) -> Rolled:
    """What is held, and behind it the new tokens."""
    own = jnp.broadcast_to(asked.positions[:, None], asked.k.shape[:3])
    pairs = zip(
        (held.keys, held.values, held.positions), (asked.k, asked.v, own), strict=True
    )
    k, v, at = (jnp.concatenate(pair, axis=2) for pair in pairs)
    return Rolled(keys=k, values=v, positions=at)


def attend(asked: LayerInputs, both: Rolled) -> Partial:
    """Attention of new tokens over what was held before them, and over each other.

    Args:
        asked: the new tokens.
        both: see `joined`.
    """
    (b, h, tokens, _), spec = asked.q.shape, asked.spec

    def read(q: Array, at: Array) -> tuple[Partial, tuple[()]]:
        found = attend_block(
            jnp.moveaxis(q, 2, 1),
            both.keys,
            both.values,
            slot_mask(at, both.positions, spec.window),
            scale=spec.scale,
            softcap=spec.softcap,
        )
        return found, ()

    # Of one device. A backward pass computes them again, however few they are.
    logits = -(-b * h * both.positions.shape[-1] // partitions())
    chunk = query_chunk(tokens, logits)
    queries = jnp.moveaxis(asked.q, 1, 2)
    return map_query_chunks(jax.checkpoint(read), chunk, queries, asked.positions)[0]


def decided(
    memory: Memory,
    asked: LayerInputs,
    both: Rolled,
    seen: Lengths,
    kind: Rolling,
    counts: Int[Array, "B"],
) -> tuple[Bool[Array, "B K S"], Memory]:
    """Which of all tokens stay behind a chunk, and what is remembered of these.

    Args:
        memory: of the queries before this chunk.
        asked: the chunk.
        both: see `joined`.
        seen: tokens of each row, the chunk's among them.
        kind: what is done.
        counts: tokens per head that stay.
    """
    assert kind.evict is not None and kind.slots is not None
    held = Held(
        k=both.keys,
        v=both.values,
        positions=both.positions,
        seen=seen,
        layer=asked.depth.layer,
        spec=asked.spec,
    )
    memory = remember(kind.evict.score, memory, asked, held)
    priorities = ranked(memory, held, kind.evict, counts)
    choice = choose(priorities, counts, kind.slots)
    kept = chosen_mask(choice, held.live) & held.live
    index, _ = _slots_of(kept, kind.slots)
    slots = jax.tree.map(lambda x: _moved(x, index), memory.slots)
    return kept, dataclasses.replace(memory, slots=slots)


def kept_of(both: Rolled, kept: Bool[Array, "B K S"], slots: int) -> Rolled:
    """Only the tokens that stay, in `slots` slots."""
    index, live = _slots_of(kept, slots)
    return Rolled(
        keys=jnp.where(live[..., None], _moved(both.keys, index), 0),
        values=jnp.where(live[..., None], _moved(both.values, index), 0),
        positions=jnp.where(live, _moved(both.positions, index), EMPTY),
    )


def _slots_of(kept: Bool[Array, "B K S"], slots: int) -> tuple[Array, Array]:
    """The token of each slot, in the order of the tokens, and whether there is one."""
    s = kept.shape[-1]
    index = jnp.sort(jnp.where(kept, jnp.arange(s), s), axis=-1)[..., :slots]
    return jnp.minimum(index, s - 1), index < s


def _moved(x: Array, index: Array) -> Array:
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, index, axis=2)


def packed(kept: Bool[Array, "*shape S"]) -> UInt8[Array, "*shape P"]:
    """Eight decisions in a byte."""
    return jnp.packbits(kept, axis=-1)


def unpacked(bits: UInt8[Array, "*shape P"], slots: int) -> Bool[Array, "*shape S"]:
    """The decisions of `packed`, of which there were `slots`."""
    return jnp.unpackbits(bits, axis=-1, count=slots).astype(bool)
