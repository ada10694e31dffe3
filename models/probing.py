"""A second look at a prompt: the model runs over tokens behind it, for a score."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import Memory
from kvjax.compress.observe import Observed
from kvjax.compress.plan import LayerPlan
from kvjax.depth import Loop, in_order, members
from kvjax.models.decoder import Attending, Decoder
from kvjax.pallas_kernels.dense import causal_attention
from kvjax.scorers.base import AbstractProbe, Look, Replayed
from kvjax.turns import take
from kvjax.types import LayerInputs, Lengths, Scores, Tokens, padded_positions


def probed(
    model: Decoder,
    tokens: Tokens,
    lengths: Lengths,
    loops: Sequence[Loop],
    seen: Sequence[Observed],
    plans: Sequence[LayerPlan],
) -> tuple[Observed, ...]:
    """What the pass over a prompt left, with what scores found by a second look.

    Args:
        model: a decoder.
        tokens: the prompts.
        lengths: of each row.
        loops: which layers are together.
        seen: what the pass left of them.
        plans: what is done in each layer.
    """
    found: dict[AbstractProbe, Scores] = {}

    def again(*given: Any, **how: Any) -> Replayed:
        return replay(model, lengths, loops, seen, *given, **how)

    def one(numbers: range, observed: Observed) -> Observed:
        evict = plans[numbers.start].evict
        score = None if evict is None else evict.score
        if not isinstance(score, AbstractProbe):
            return observed
        if score not in found:
            found[score] = score.probe(again, tokens, lengths)
        mine = found[score][numbers.start : numbers.stop : numbers.step]
        return dataclasses.replace(observed, memory=Memory(slots=mine))

    return tuple(map(one, members(loops), seen))


def replay(
    model: Decoder,
    lengths: Lengths,
    loops: Sequence[Loop],
    seen: Sequence[Observed],
    tokens: Tokens,
    positions: Int[Array, "B R"],
    look: Look | None = None,
    gates: Float[Array, "L B K S"] | None = None,
) -> Replayed:
    """Tokens behind a prompt through the model; see `scorers.base.Again`."""

    def step(inputs: LayerInputs, state: None):
        depth = inputs.depth
        held = take(seen[depth.group], depth.turn)
        width = held.k.shape[2]
        at = padded_positions(lengths, width)
        gate = None if gates is None else take(gates, depth.layer)

        def bias(q_positions: Array, k_positions: Array) -> Array:
            assert gate is not None
            shape = (*gate.shape[:2], q_positions.shape[1], k_positions.shape[1])
            fresh = [(0, 0), (0, 0), (0, k_positions.shape[1] - width)]
            padded = jnp.pad(gate, fresh, constant_values=1.0)
            return jnp.broadcast_to(jnp.log(padded)[:, :, None], shape)

        part = causal_attention(
            inputs.q,
            jnp.concatenate([held.k, inputs.k], axis=2),
            jnp.concatenate([held.v, inputs.v], axis=2),
            inputs.positions,
            jnp.concatenate([at, inputs.positions], axis=1),
            scale=inputs.spec.scale,
            window=inputs.spec.window,
            softcap=inputs.spec.softcap,
            bias=None if gates is None else bias,
        )
        return part.out, state, () if look is None else look(inputs, held.k, held.v)

    passed = model.run(tokens, positions, Attending(step=step, loops=tuple(loops)))
    looks = None if look is None else in_order(passed.loops, passed.left)
    return Replayed(logits=model.logits(passed.hidden), looks=looks)
