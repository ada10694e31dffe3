"""The parallel form: one pass over a whole sequence that means what the cache means.

Tokens behind a row's compression point attend to what `build` keeps of the prompt,
decoded with straight-through gradients, and to each other; tokens before it attend as
in prefill. Nothing here knows a method: the recurrent form's own parts do the work.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import self_attention
from kvjax.cache import LayerCache, Memory, Slots
from kvjax.cache.parts import AbstractPart
from kvjax.cache.selecting import AbstractSelecting
from kvjax.codecs import PlainArray, straight_through
from kvjax.compress import in_place
from kvjax.compress.chunks import in_chunks
from kvjax.compress.config import Compression
from kvjax.compress.layer import build
from kvjax.compress.observe import observe, wants_mass
from kvjax.compress.relaxed import relaxed_choice
from kvjax.compress.survey import Layout, Survey
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from kvjax.turns import take
from kvjax.types import EMPTY, LayerInputs, Lengths, Scores, padded_positions


def attend(
    inputs: LayerInputs,
    prompt_lengths: Lengths,
    c: Compression,
    surveyed: Survey,
    priorities: Scores | None,
    later: int | None = None,
    choice_gradient: float = 0.0,
) -> tuple[Float[Array, "B H T D"], Scores | None]:
    """One layer of the parallel form.

    Args:
        inputs: the layer's queries, keys and values of the whole sequence; the kind of
            its depth is its `Layout`.
        prompt_lengths: `[B]` compression points.
        c: what is done to the prompt.
        surveyed: what each layer gets.
        priorities: those of the layer before, for index reuse.
        later: no row has more tokens behind its compression point; None: any number.
        choice_gradient: temperature of the gradient that the choice of tokens gets, see
            `relaxed.relaxed_choice`; 0 gives it none.

    Returns:
        The attention output, and the priorities that this layer used.
    """
    tokens = inputs.k.shape[2]
    later = tokens if later is None else min(later, tokens)
    inside = padded_positions(prompt_lengths, tokens)
    prompt = dataclasses.replace(inputs, positions=inside)
    before, mass = None, None
    layout: Layout = inputs.depth.kind
    if c.schedule.chunk is not None:
        how = (prompt, prompt_lengths, layout, surveyed.share, c.schedule.chunk)
        before, observed = in_chunks(*how)
    else:
        if wants_mass(c) or not c.prefill.causal:
            before, mass = c.prefill.attend(prompt, prompt_lengths, wants_mass(c))
        observed = observe(prompt, prompt_lengths, layout.plan, mass)
    evict, scores = layout.plan.evict, surveyed.scores
    if scores is not None and evict is not None and evict.score.probes:
        memory = Memory(slots=take(scores, inputs.depth.layer))
        observed = dataclasses.replace(observed, memory=memory)
    layer, priorities = build(
        observed,
        prompt_lengths,
        layout,
        surveyed.of(inputs.depth),
        room=later,
        layer=inputs.depth.layer,
        priorities=priorities,
        differentiable=True,
    )
    # In line behind the point: [B, H, later, D], the answers first.
    line = prompt_lengths[:, None] + jnp.arange(later)
    moved = inputs.taken(jnp.minimum(line, tokens - 1), line < tokens)
    behind = inside == EMPTY
    evict = layout.plan.evict
    merged = evict is not None and evict.merge is not None
    if in_place.fits(layer, merged):
        body, edge = layer.parts[0], jnp.ones(behind.shape, jnp.int32)
        if layer.growth is not None:
            body, _, edges = _grown(moved, layer)
            edge = jnp.take_along_axis(edges, _turns_of(behind, later), axis=1)
        changed = merged or not layout.plan.store.plain
        earlier = in_place.earlier_tokens(body, edge, layer, changed, behind)
        if choice_gradient and priorities is not None:
            soft = relaxed_choice(earlier.kept, priorities, choice_gradient)
            earlier = dataclasses.replace(earlier, soft=soft)
        out = self_attention(inputs, earlier=earlier)[0]
        if c.prefill.causal and c.schedule.chunk is None:
            return out, priorities
    else:
        out = _in_line(moved, layer, behind)
    if before is None:
        before, _ = c.prefill.attend(prompt, prompt_lengths, False)
    return jnp.where(behind[:, None, :, None], out, before), priorities


def _in_line(
    moved: LayerInputs, layer: LayerCache, behind: Bool[Array, "B T"]
) -> Float[Array, "B H T D"]:
    """Attention of the tokens behind the point by the parts of the cache themselves.

    For parts of which every query reads something else, and caches that evict while
    decoding: there, what a token sees depends on the queries before it.
    """
    out = _behind(moved, layer) if layer.folding is None else layer.attend(moved)[0]
    place = _turns_of(behind, moved.q.shape[2])
    return jnp.take_along_axis(out, place[:, None, :, None], axis=2)


def _turns_of(behind: Bool[Array, "B T"], later: int) -> Int[Array, "B T"]:
    """Places in line of the tokens behind the point; anything for the others."""
    return jnp.clip(jnp.cumsum(behind, axis=1) - 1, 0, later - 1)


def _behind(inputs: LayerInputs, layer: LayerCache) -> Float[Array, "B H L D"]:
    """Attention of the tokens behind the compression point, which `inputs` holds."""
    (b, h, tokens, _), spec = inputs.q.shape, layer.spec
    if layer.growth is None:
        body, plain = layer.parts, _plain(inputs)
        edges = jnp.zeros_like(inputs.positions)
    else:
        grown, plain, edges = _grown(inputs, layer)
        body = (grown,)
    slot = jnp.arange(plain.positions.shape[-1])

    def read(q: Array, at: Array, edge: Array) -> tuple[Partial, tuple[()]]:
        q = jnp.moveaxis(q, 2, 1)
        limit = None if layer.growth is None else edge
        known = [part.attend(q, at, spec, limit) for part in body]
        # A token is read plain until its block has moved into the body.
        waiting = slot >= edge[:, None, :, None]
        recent = attend_block(
            q,
            plain.keys.decode(plain.positions, spec.rope),
            plain.values.decode(plain.positions, spec.rope),
            slot_mask(at, plain.positions, spec.window) & waiting,
            scale=spec.scale,
            softcap=spec.softcap,
        )
        return merge([*known, recent]), ()

    slots = nslots(body) + slot.shape[0]
    chunk = query_chunk(tokens, b * h * slots)
    queries = jnp.moveaxis(inputs.q, 1, 2)
    return map_query_chunks(read, chunk, queries, inputs.positions, edges)[0].out


def nslots(parts: tuple[AbstractPart, ...]) -> int:
    """Slots of all parts, for sizing chunks."""
    return sum(int(part.positions.shape[-1]) for part in parts)


def _plain(inputs: LayerInputs) -> Slots:
    """The later tokens themselves."""
    (b, k, t, _), positions = inputs.k.shape, inputs.positions
    live = (positions >= 0)[:, None, :, None]
    return Slots(
        keys=PlainArray(data=jnp.where(live, inputs.k, 0)),
        values=PlainArray(data=jnp.where(live, inputs.v, 0)),
        positions=jnp.broadcast_to(positions[:, None], (b, k, t)),
    )


def _grown(
    inputs: LayerInputs, layer: LayerCache
) -> tuple[AbstractPart, Slots, Int[Array, "B L"]]:
    """A body that takes up blocks of later tokens, at its final size.

    Returns:
        The body with every block encoded; the same slots plain, from the prompt's
        remainder on; and per query how many slots had been encoded by then.
    """
    body, tail, growth = layer.parts[0], layer.tail, layer.growth
    assert isinstance(body, Slots | AbstractSelecting) and growth is not None
    assert body.filled is not None
    tokens, block = inputs.k.shape[2], growth.block
    slots = -(-(body.positions.shape[-1] + block + tokens) // block) * block
    slot = jnp.arange(slots)
    wait = slot - body.filled[:, None]  # place in line behind the encoded prompt
    source = wait - tail.used[:, None]
    plain = _line(inputs, tail, wait, source)
    edge = tail.used[:, None] + jnp.arange(tokens)
    edges = body.filled[:, None] + edge // block * block
    encoded = _encode_line(plain, layer)
    start = (wait < 0)[:, None, :]

    def joined(first, rest):
        pad = [(0, 0)] * first.ndim
        pad[2] = (0, slots - first.shape[2])
        mask = start if first.ndim == 3 else start[..., None]
        return jnp.where(mask, jnp.pad(first, pad), rest)

    rope = layer.spec.rope

    def decoded(side: str) -> PlainArray:
        first, rest = getattr(body, side), getattr(encoded, side)
        first = first.decode(body.positions, rope)
        return PlainArray(data=joined(first, rest.decode(encoded.positions, rope)))

    held = Slots(
        keys=decoded("keys"),
        values=decoded("values"),
        positions=joined(body.positions, encoded.positions),
    )
    return body.whole(held, layer.spec), plain, edges


def _line(inputs, tail, wait, source) -> Slots:
    """Tokens that wait to be encoded, by slot: the prompt's rest, then later ones."""
    b, k, tokens, _ = inputs.k.shape
    in_tail = (wait >= 0) & (wait < tail.used[:, None])
    later = (wait >= tail.used[:, None]) & (source < tokens)
    from_tail = jnp.clip(wait, 0, tail.capacity - 1)[:, None]
    from_later = jnp.clip(source, 0, tokens - 1)[:, None]

    def pick(old, new, empty):
        rank = (1,) * (new.ndim - 3)
        shape = (b, k, from_tail.shape[-1])
        index = [jnp.broadcast_to(i, shape) for i in (from_tail, from_later)]
        index = [i.reshape(*shape, *rank) for i in index]
        masks = [m[:, None].reshape(b, 1, -1, *rank) for m in (in_tail, later)]
        value = jnp.where(masks[1], jnp.take_along_axis(new, index[1], axis=2), empty)
        return jnp.where(masks[0], jnp.take_along_axis(old, index[0], axis=2), value)

    zero = jnp.zeros((), inputs.k.dtype)
    at = jnp.broadcast_to(inputs.positions[:, None], (b, k, tokens))
    held = pick(tail.positions, at, EMPTY)
    live = (held >= 0)[..., None]
    return Slots(
        keys=PlainArray(data=jnp.where(live, pick(tail.keys, inputs.k, zero), 0)),
        values=PlainArray(data=jnp.where(live, pick(tail.values, inputs.v, zero), 0)),
        positions=held,
    )


def _encode_line(plain: Slots, layer: LayerCache) -> Slots:
    """What the waiting tokens become once their block is encoded."""
    growth, rope = layer.growth, layer.spec.rope
    assert growth is not None
    live = plain.positions >= 0

    def through(held, codec):
        x = held.decode(plain.positions, rope)
        decoded = codec.encode(x, live, plain.positions, rope).decode(
            plain.positions, rope
        )
        return PlainArray(data=straight_through(x, decoded))

    return Slots(
        keys=through(plain.keys, growth.keys),
        values=through(plain.values, growth.values),
        positions=plain.positions,
    )
