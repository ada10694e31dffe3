"""`simulate`: teacher-forced logits under compression in one differentiable pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvjax.compress import parallel
from kvjax.compress.building import Building
from kvjax.compress.config import Compression
from kvjax.compress.layer import handed_on
from kvjax.compress.observe import Observed
from kvjax.compress.plan import LayerPlan
from kvjax.compress.survey import Survey, plans_of, survey
from kvjax.depth import in_order, members
from kvjax.models import checks
from kvjax.models.decoder import Attending, Decoder
from kvjax.models.finite import check_rows
from kvjax.models.meshes import entry
from kvjax.models.prompts import NONE
from kvjax.models.reading import observe_prompt
from kvjax.types import (
    LayerInputs,
    Lengths,
    LengthsLike,
    Scores,
    Tokens,
    TokensLike,
    loops_of,
    padded_positions,
)


@functools.partial(jax.jit, static_argnames=("graph", "c"))
def _simulate(graph, params, tokens, lengths, prompt_lengths, c: Compression):
    model = nnx.merge(graph, params)
    positions = padded_positions(lengths, tokens.shape[1])
    attention = simulated(model, prompt_lengths, tokens, c)
    logits = model.logits(model(tokens, positions, attention, trained=True))
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return logits, jnp.isfinite(peak) | (positions < 0)


def simulated(
    model: Decoder,
    prompt_lengths: Lengths,
    tokens: Tokens,
    c: Compression,
    later: int | None = None,
    choice_gradient: float = 0.0,
) -> Attending:
    """Attention of passes in which prompts are compressed at `prompt_lengths`.

    Nothing is checked; see `simulate`. `tokens` are those of the whole rows: what a
    score or a budget has to know of all layers is found out by a pass of its own. That
    no row has more than `later` tokens behind its point, where it is known, saves their
    work. `choice_gradient` above 0 is the temperature of a gradient for which tokens
    are kept (`kvjax.compress.relaxed`).
    """
    specs, width = model.config.layers, tokens.shape[1]
    start = handed_on(c, prompt_lengths.shape[0], specs[0], width)
    if c.surveys:
        found = surveyed(model, prompt_lengths, tokens, c)
    else:
        found = survey(c, specs, prompt_lengths, width, model.dtype)

    def step(inputs: LayerInputs, priorities: Scores | None):
        how = (prompt_lengths, c, found, priorities, later, choice_gradient)
        out, chosen = parallel.attend(inputs, *how)
        return out, None if start is None else chosen, ()

    return Attending(step=step, state=start, kinds=found.layouts)


def surveyed(
    model: Decoder, prompt_lengths: Lengths, tokens: Tokens, c: Compression
) -> Survey:
    """What each layer gets by the data of all of them, without a gradient."""
    graph, params = nnx.split(model)
    fixed = nnx.merge(graph, jax.lax.stop_gradient(params))
    specs, width = model.config.layers, tokens.shape[1]
    _, seen = observe_prompt(fixed, tokens, prompt_lengths, c)
    loops = loops_of(specs, plans_of(c, specs, width))
    building = Building.of(c, specs, prompt_lengths, width, 0, model.dtype)
    found = building.surveyed(loops, seen).found
    if not c.probes:
        return found
    plans = [plans_of(c, specs, width)[group.start] for group in members(loops)]
    scores = in_order(loops, list(map(_of_probe, plans, seen)))
    return dataclasses.replace(found, scores=scores)


def _of_probe(plan: LayerPlan, seen: Observed) -> Float[Array, "turns B K S"]:
    """What a probe found of some layers; zeros where another score ranks, or none."""
    if plan.evict is None or not plan.evict.score.probes:
        return jnp.zeros(seen.k.shape[:-1], jnp.float32)
    assert seen.memory is not None
    return seen.memory.slots


@entry
def simulate(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None = None,
    prompt_lengths: LengthsLike | None = None,
    c: Compression = NONE,
) -> Float[Array, "B T V"]:
    """Logits of a whole sequence whose prompt is compressed at `prompt_lengths`.

    Equal to teacher forcing through the real cache: `prefill` on the prompt, then
    `extend` with the rest. Differentiable in the model's weights: gradients pass
    codecs straight through and reach kept tokens only.

    Args:
        model: a decoder.
        tokens: `[B, T]` right-padded sequences.
        lengths: `[B]` tokens per row; None: all of them.
        prompt_lengths: `[B]` tokens before the compression point, at least 1; None:
            all of `lengths`.
        c: what is done.

    Returns:
        `[B, T, V]` float32; anything behind a row's length.

    Raises:
        ValueError: see `prefill`; logits that are not finite, unless they are traced.

    Cost: twice the attention of a plain pass; temporaries linear in `T`. A schedule
    that evicts while decoding scans the tokens behind the point, layer by layer.
    """
    tokens, lengths = checks.asked(model, tokens, lengths)
    points = lengths if prompt_lengths is None else prompt_lengths
    points = checks.prompt_lengths(points, lengths)
    checks.compression(model.config, c, points)
    graph, params = nnx.split(model)
    logits, sound = _simulate(graph, params, tokens, lengths, points, c)
    check_rows(model.dtype, sound)
    return logits
