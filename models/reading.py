"""The pass over a prompt, and over what is in front of it: what it leaves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.cache import KVCache, Shared
from kvjax.compress.config import Compression
from kvjax.compress.observe import Observed, observe, wants_mass
from kvjax.compress.plan import LayerPlan
from kvjax.compress.survey import plans_of
from kvjax.depth import Loop, regrouped
from kvjax.models.decoder import Attending, Decoder
from kvjax.models.probing import Rereading, probed
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.types import LayerInputs, Lengths, Tokens, loops_of, padded_positions

Prefix = tuple[tuple[Shared, ...], ...]
"""What is in front of a prompt, by the groups of some loops."""


def seen_before(prefix: KVCache | None) -> Any:
    """Tokens of a prefix."""
    return 0 if prefix is None else prefix.length[0]


def in_front(prefix: KVCache | None, rows: int, loops: Sequence[Loop]) -> Prefix | None:
    """Parts of a prefix in the groups of `loops`."""
    if prefix is None:
        return None
    held = [(*group.parts, group.tail) for group in prefix.groups]
    groups = regrouped(prefix.loops, held, loops)
    return tuple(
        tuple(Shared(part=part, rows=rows) for part in group) for group in groups
    )


def with_prefix(prefix: KVCache | None, cache: KVCache) -> KVCache:
    """The cache of prompts with a prefix in front."""
    front = in_front(prefix, len(cache.length), cache.loops)
    if front is None:
        return cache
    groups = tuple(
        dataclasses.replace(group, parts=(*group.parts, *parts))
        for group, parts in zip(cache.groups, front, strict=True)
    )
    return dataclasses.replace(cache, groups=groups)


def attend_prompt(
    c: Compression, inputs: LayerInputs, lengths: Lengths, prefix: Prefix | None
) -> tuple[Array, LayerInputs, Array | None]:
    """Attention of a prompt over itself, and over what is in front of it.

    Returns:
        The output; the inputs, with what is paid to the prefix; column sums if wanted.
    """
    mass = wants_mass(c)
    if prefix is None:
        out, sums = c.prefill.attend(inputs, lengths, mass)
        return out, inputs, sums
    depth, spec = inputs.depth, inputs.spec
    (b, h, tokens, _), parts = inputs.q.shape, prefix[depth.group]

    def read(q: Array, positions: Array) -> tuple[Partial, tuple[()]]:
        q = jnp.moveaxis(q, 2, 1)
        read = (q, positions, spec, None, depth.turn)
        return merge([part.attend(*read) for part in parts]), ()

    slots = sum(int(part.positions.shape[-1]) for part in parts)
    chunk, queries = query_chunk(tokens, b * h * slots), jnp.moveaxis(inputs.q, 1, 2)
    past = map_query_chunks(read, chunk, queries, inputs.positions)[0]
    inputs = dataclasses.replace(inputs, elsewhere=past.lse)
    out, sums = c.prefill.attend(inputs, lengths, mass, past)
    return out, inputs, sums


def observe_prompt(
    model: Decoder,
    tokens: Tokens,
    lengths: Lengths,
    c: Compression,
    prefix: KVCache | None = None,
    longest: int | None = None,
) -> tuple[Float[Array, "B V"], tuple[Observed, ...]]:
    """The pass over a prompt: logits of each row's last token, and what it leaves.

    What is left serves every budget of `c` (`Compression.with_keep`). Of layers that
    any budget treats alike it is together, with a first axis for them. No row has more
    than `longest` tokens; None: than there are.
    """
    specs, width = model.config.layers, tokens.shape[1]
    plans = plans_of(c, specs, longest or width)
    loops = loops_of(specs, plans)
    groups, before = in_front(prefix, len(lengths), loops), seen_before(prefix)

    def look(inputs: LayerInputs, state: None):
        out, inputs, sums = attend_prompt(c, inputs, lengths, groups)
        plan: LayerPlan = inputs.depth.kind
        return out, state, observe(inputs, lengths + before, plan, sums)

    positions = padded_positions(lengths, width, before)
    looking = Attending(step=look, kinds=plans, loops=loops)
    seen = model.run(tokens, positions, looking)
    left = seen.left
    if c.probes:
        again = Rereading(model=model, lengths=lengths, loops=loops, seen=left)
        left = probed(again, tokens, lengths, loops, left, plans)
    return last_logits(model, seen.hidden, lengths), left


def last_logits(
    model: Decoder, hidden: Float[Array, "B T E"], lengths: Lengths
) -> Float[Array, "B V"]:
    """Logits of each row's last token."""
    return model.logits(last_of(hidden, lengths))


def last_of(x: Float[Array, "B T C"], lengths: Lengths) -> Float[Array, "B C"]:
    """Of all tokens, what each row's last one has."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(x, last, axis=1)[:, 0]
