"""The pass over a prompt, and over what is in front of it: what it leaves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.cache import Front, KVCache, attend_earlier
from kvjax.compress.config import Compression
from kvjax.compress.observe import Observed, observe, wants_mass
from kvjax.compress.plan import LayerPlan
from kvjax.compress.survey import plans_of
from kvjax.depth import Loop, members
from kvjax.models.decoder import Attending, Decoder
from kvjax.models.probing import Rereading, probed
from kvjax.types import LayerInputs, Lengths, Tokens, loops_of, padded_positions


def seen_before(prefix: KVCache | None) -> Any:
    """Tokens of a prefix."""
    return 0 if prefix is None else prefix.length[0]


def marks_of(prefix: KVCache | None) -> tuple[int, ...]:
    """Of every layer the group of the prefix that it is in: they are read apart."""
    if prefix is None:
        return ()
    groups = members(prefix.loops)
    places = {layer: n for n, group in enumerate(groups) for layer in group}
    return tuple(places[layer] for layer in range(len(places)))


def in_front(prefix: KVCache | None, rows: int, loops: Sequence[Loop]) -> Front:
    """Parts of a prefix in the groups of `loops`, which heed `marks_of`: no copies."""
    wanted = members(loops)
    if prefix is None:
        return ((),) * len(wanted)
    held = [group.in_front(rows) for group in prefix.groups]
    groups, marks, found = members(prefix.loops), marks_of(prefix), []
    for numbers in wanted:
        group = groups[marks[numbers[0]]]
        first, last = group.index(numbers[0]), group.index(numbers[-1])
        turns = range(first, last + 1, max(1, numbers.step // group.step))
        found.append(tuple(part.among(turns) for part in held[marks[numbers[0]]]))
    return tuple(found)


def attend_prompt(
    c: Compression, inputs: LayerInputs, lengths: Lengths, prefix: Front
) -> tuple[Array, LayerInputs, Array | None]:
    """Attention of a prompt over itself, and over what is in front of it.

    Returns:
        The output; the inputs, with what is paid to the prefix; column sums if wanted.
    """
    mass, parts = wants_mass(c), prefix[inputs.depth.group]
    if not parts:
        out, sums = c.prefill.attend(inputs, lengths, mass)
        return out, inputs, sums
    past = attend_earlier(inputs, parts, inputs.depth.turn)
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
    loops = loops_of(specs, plans, marks_of(prefix))
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
