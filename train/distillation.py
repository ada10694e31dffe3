"""What a pass computes on its way, and how far it is from a teacher's."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.depth import in_order
from kvjax.models.decoder import Attending, Attention, Decoder, attending
from kvjax.train.mesh import along_rows
from kvjax.train.recipe import ObjectiveConfig
from kvjax.types import LayerInputs, Lengths, Tokens, pytree


@pytree
class Watched:
    """One pass over rows of tokens.

    Attributes:
        last: hidden states after the final norm.
        hidden: the residual stream behind every layer but the last, then `last`; what
            transformers calls `hidden_states[1:]`. With `hidden_layers: last` that one
            alone; None unless `hidden` has a weight.
        attention: each layer's attention before the o projection, heads side by side;
            None unless `attention` has a weight.
        state: what attention handed on behind the last layer.
    """

    last: Float[Array, "B T E"]
    hidden: Float[Array, "L B T E"] | None
    attention: Float[Array, "L B T HD"] | None
    state: Any


def watched(
    model: Decoder,
    tokens: Tokens,
    attention: Attention | Attending,
    config: ObjectiveConfig,
    *,
    remat: bool = False,
    loop: bool = False,
) -> Watched:
    """The pass of `model`, and of its inside what the terms of `config` compare.

    Args:
        model: the student, or the teacher.
        tokens: `[B, T]`, in order from position 0.
        attention: what it attends by.
        config: what is kept; nothing is without a weight.
        remat: recompute layers in the backward pass.
        loop: compile equal layers once.

    Cost: with all terms, temporaries of `L (E + H D)` numbers per token.
    """
    rows, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    every = bool(config.hidden) and config.hidden_layers == "all"
    if config.attention:
        attention = _outputs(attention)
    seen = model.run(
        tokens,
        positions,
        attention,
        trained=True,
        remat=remat,
        unroll=not loop,
        streams=every,
        place=along_rows,
    )
    last, hidden, outputs = seen.hidden, None, None
    if config.hidden:
        hidden = last[None]
    if every:
        hidden = in_order(seen.loops, seen.streams).at[-1].set(last)
    if config.attention:
        outputs = in_order(seen.loops, seen.left)
    return Watched(last=last, hidden=hidden, attention=outputs, state=seen.state)


def _outputs(attention: Attention | Attending) -> Attending:
    """`attention` that leaves what the o projection gets."""
    inner = attending(attention)

    def step(inputs: LayerInputs, state: Any):
        out, state, _ = inner.step(inputs, state)
        b, _, t, _ = out.shape
        kept = jnp.moveaxis(out, 1, 2).reshape(b, t, -1)
        return out, state, kept.astype(inputs.q.dtype)

    return dataclasses.replace(inner, step=step)


Places = Callable[[Array, Array, Lengths], Bool[Array, "B T-1"]]


def answers(flags: Array, weights: Array, points: Lengths) -> Array:
    """Where an answer token is predicted, as the KL divergence has it."""
    del weights, points
    return flags[:, 1:]


def behind(flags: Array, weights: Array, points: Lengths) -> Array:
    """Where any token behind the compression point is predicted.

    Up to the last one that is an answer or has a weight: padding has neither.
    """
    target = (flags | (weights > 0)).astype(jnp.int32)
    live = jax.lax.cummax(target, axis=1, reverse=True) > 0
    index = jnp.arange(flags.shape[1])
    return (live & (index >= points[:, None]))[:, 1:]


PLACES: Mapping[str, Places] = MappingProxyType({"answers": answers, "behind": behind})
"""By name: `(answers [B T], weights [B T], compression points [B])` to a mask."""


def distances(
    ours: Watched, wanted: Watched, places: Bool[Array, "B T-1"]
) -> dict[str, Float[Array, ""]]:
    """Mean `relative_error` over the layers, by the name of the term."""
    pairs = {
        "hidden": (ours.hidden, wanted.hidden),
        "attention": (ours.attention, wanted.attention),
    }
    each = jax.vmap(lambda x, y: relative_error(x[:, :-1], y[:, :-1], places))
    return {
        name: jnp.mean(each(one, other))
        for name, (one, other) in pairs.items()
        if one is not None
    }


def relative_error(
    ours: Float[Array, "B T C"],
    wanted: Float[Array, "B T C"],
    places: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Mean squared error over `places`, as a share of `wanted`'s mean square there.

    0 where `places` is empty; no gradient reaches `wanted`.
    """
    wanted = jax.lax.stop_gradient(wanted).astype(jnp.float32)
    miss = jnp.square(ours.astype(jnp.float32) - wanted)
    counted = places[..., None]
    total = jnp.sum(jnp.where(counted, jnp.square(wanted), 0.0))
    return jnp.sum(jnp.where(counted, miss, 0.0)) / jnp.maximum(total, 1e-30)
