"""A cache that is compressed again behind every chunk of a row.

A row is read chunk by chunk. The tokens of a chunk attend to what is held of those
before it and to each other; then they are held too, and of all that is held the best
stay, as many as the budget has slots. So a layer holds no more than its slots between
two chunks and no more than these and a chunk while it reads one, however long the row.

Scores are the same as after a prompt: they see what was asked and what is held, by
absolute positions. What has been dropped is gone. Slots are in the order of positions,
free ones anywhere.

Which tokens stay is said by one bit per token (`kept`), so that a pass can be repeated
with the decisions of the first one: they are then data, and scores are not needed
(`kvjax.compress.rolled`). A layer in which nothing is dropped has a slot for every
token, in the form in which they are stored (`kvjax.compress.growing`).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.cache import Memory, Shared, Slots, Tail, attend_earlier
from kvjax.compress.observe import Observed, remember
from kvjax.compress.priorities import ranked
from kvjax.compress.rolled import Rolled, index_of, joined, kept_of, moved
from kvjax.compress.select import choose, choose_flat, chosen_mask, head_counts
from kvjax.compress.stored import merged
from kvjax.compress.survey import Layout, Share
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.dispatch import partitions
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.turns import Turn, put, take
from kvjax.types import EMPTY, Held, LayerInputs, LayerSpec, Lengths, pytree


@pytree
class Holding:
    """What a layer holds between two chunks; of several layers, with a first axis.

    Attributes:
        tokens: plain where some may be dropped, else as they are stored.
        memory: of the score, where some may be dropped.
        rest: the newest tokens of a layer that stores whole blocks, plain.
    """

    tokens: Rolled | Slots
    memory: Memory | None = None
    rest: Tail | None = None


@pytree
class Place:
    """Where in its rows a chunk is.

    Attributes:
        column: of its first token.
        seen: tokens of each row, those of the chunk among them.
        lengths: tokens of each row in the end, those in front of it not counted.
        share: what each layer gets of rows of these lengths.
    """

    column: Int[Array, ""]
    seen: Int[Array, "B"]
    lengths: Int[Array, "B"]
    share: Share


def nothing_held(asked: LayerInputs, layout: Layout) -> Holding:
    """What a layer holds before the first chunk.

    Args:
        asked: any tokens of the layer; their shapes count.
        layout: with an eviction.
    """
    evict, n = layout.plan.evict, layout.slots
    assert evict is not None
    b, kv_heads, _, d = asked.k.shape
    heads = () if layout.shared else (kv_heads,)
    blank = jnp.zeros((b, *heads, n, d), asked.k.dtype)
    free = jnp.full((b, *heads, n), EMPTY, jnp.int32)
    none = dataclasses.replace(asked, positions=jnp.full_like(asked.positions, EMPTY))
    memory = Memory(
        slots=jax.tree.map(
            lambda x: jnp.zeros((b, *heads, n, *x.shape[3:]), x.dtype),
            jax.eval_shape(evict.score.tokens, none),
        ),
        row=evict.score.row(none, None),
    )
    offsets = jnp.zeros((b, kv_heads + 1), jnp.int32) if layout.shared else None
    tokens = Rolled(keys=blank, values=blank, positions=free, offsets=offsets)
    return Holding(tokens=tokens, memory=memory)


def read(
    holding: Holding,
    asked: LayerInputs,
    at: Place,
    layout: Layout,
    turn: Turn = None,
    front: Sequence[Shared] = (),
) -> tuple[Array, Holding, Bool[Array, "B K S"]]:
    """A chunk in a layer that drops tokens.

    Args:
        holding: in front of the chunk.
        asked: its tokens.
        at: where it is.
        layout: what is done.
        turn: which layer's, where `holding` is that of several.
        front: what is in front of all rows.

    Returns:
        Attention `[B, H, T, D]`; what is held behind the chunk; and which of the tokens
        held before it and its own stayed.
    """
    before = opened(take(holding, turn))
    assert isinstance(before.tokens, Rolled) and before.memory is not None
    both, others = joined(before.tokens, asked), []
    if front:
        others = [attend_earlier(asked, front, turn)]
        asked = dataclasses.replace(asked, elsewhere=others[0].lse)
    out = merge([attend(asked, both), *others]).out
    share = take(at.share, jnp.asarray(asked.depth.layer))
    kept, memory, both = decided(before.memory, asked, both, at.seen, layout, share)
    index = index_of(kept, layout)
    slots = jax.tree.map(lambda x: moved(x, index), memory.slots)
    after = Holding(
        tokens=kept_of(both, kept, layout),
        memory=dataclasses.replace(memory, slots=slots),
    )
    # All layers' arrays are read above and written below.
    out, after = jax.lax.optimization_barrier((out, after))
    return out, put(holding, after, turn), kept


def observed_of(holding: Holding, spec: LayerSpec) -> Observed:
    """What a layer holds in the end, as `build` wants it."""
    held = opened(holding)
    assert isinstance(held.tokens, Rolled)
    return Observed(
        k=held.tokens.keys,
        v=held.tokens.values,
        positions=held.tokens.positions,
        memory=held.memory,
        look=(),
        sides=(None, None),
        spec=spec,
    )


def opened(holding: Holding) -> Holding:
    """One layer's, with slots for every head apart."""
    tokens, memory = holding.tokens, holding.memory
    assert isinstance(tokens, Rolled) and memory is not None
    if tokens.offsets is None:
        return holding
    slot = jnp.arange(tokens.positions.shape[-1])
    index = tokens.offsets[:, :-1, None] + slot
    live = index < tokens.offsets[:, 1:, None]
    rows = jnp.arange(index.shape[0])[:, None, None]
    index = jnp.minimum(index, slot.shape[0] - 1)

    def of_heads(x: Array) -> Array:
        return x[rows, index]

    apart = Rolled(
        keys=of_heads(tokens.keys),
        values=of_heads(tokens.values),
        positions=jnp.where(live, of_heads(tokens.positions), EMPTY),
    )
    slots = jax.tree.map(of_heads, memory.slots)
    return Holding(tokens=apart, memory=dataclasses.replace(memory, slots=slots))


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
    layout: Layout,
    share: Share,
) -> tuple[Bool[Array, "B K S"], Memory, Rolled]:
    """Which of all tokens stay behind a chunk, what is remembered, what they become.

    Args:
        memory: of the queries before this chunk.
        asked: the chunk.
        both: see `joined`.
        seen: tokens of each row, the chunk's among them.
        layout: what is done.
        share: what the layer gets.
    """
    evict = layout.plan.evict
    assert evict is not None
    held = Held(
        k=both.keys,
        v=both.values,
        positions=both.positions,
        seen=seen,
        layer=asked.depth.layer,
        spec=asked.spec,
    )
    memory = remember(evict.score, memory, asked, held)
    priorities = ranked(memory, held, evict, share.counts)
    if layout.shared:
        assert share.sure is not None and share.total is not None
        heads = head_counts(priorities, share.sure, share.total, layout.slots)
        choice = choose_flat(priorities, heads, layout.slots)
    else:
        choice = choose(priorities, share.held, layout.slots)
    kept = chosen_mask(choice, held.live) & held.live
    if evict.merge is not None:
        k, v = merged(evict, memory, held, kept, share.counts)
        both = dataclasses.replace(both, keys=k, values=v)
    return kept, memory, both
