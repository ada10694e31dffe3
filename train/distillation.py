"""What a pass computes on its way, and how far it is from a teacher's."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.models.decoder import Attention, Carrying, Decoder
from kvjax.train.mesh import along_rows
from kvjax.train.objective_config import ObjectiveConfig
from kvjax.types import LayerInputs, Lengths, Tokens, pytree


@pytree
class Watched:
    """One pass over rows of tokens.

    Attributes:
        last: hidden states after the final norm.
        hidden: the residual stream behind every layer but the last, then `last`; what
            transformers calls `hidden_states[1:]`. With `hidden_layers: last` that one
            alone; empty unless `hidden` has a weight.
        attention: each layer's attention before the o projection, heads side by side;
            empty unless `attention` has a weight.
    """

    last: Float[Array, "B T E"]
    hidden: tuple[Float[Array, "B T E"], ...]
    attention: tuple[Float[Array, "B T HD"], ...]


def watched(
    model: Decoder,
    tokens: Tokens,
    attention: Attention,
    config: ObjectiveConfig,
    *,
    remat: bool = False,
    loop: bool = False,
) -> Watched:
    """The pass of `model`, and of its inside what the terms of `config` compare.

    Args:
        model: the student, or the teacher.
        tokens: `[B, T]`, in order from position 0.
        attention: what it attends by. A `Carrying` ends with the state that it would
            have ended with in a pass that nobody watches.
        config: what is kept; nothing is without a weight.
        remat: recompute layers in the backward pass.
        loop: compile equal layers once; not where all layers are kept.

    Cost: with all terms, temporaries of `L (E + H D)` numbers per token.
    """
    rows, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    every = bool(config.hidden) and config.hidden_layers == "all"
    if not every and not config.attention:
        how = {"remat": remat, "loop": loop, "place": along_rows}
        last = model(tokens, positions, attention, **how)
        return Watched(last=last, hidden=(last,) if config.hidden else (), attention=())
    recorder = _recorder(attention, outputs=bool(config.attention), streams=every)
    last = model(tokens, positions, recorder, remat=remat, place=along_rows)
    inner, outputs, streams = recorder.state
    if isinstance(attention, Carrying):
        attention.state = inner
    hidden = (*streams[:-1], last) if config.hidden else ()
    return Watched(last=last, hidden=hidden, attention=outputs)


def _recorder(attention: Attention, *, outputs: bool, streams: bool) -> Carrying:
    """`attention`; its state is `(inner state, outputs, residual streams)`."""
    inner = attention if isinstance(attention, Carrying) else None

    def step(inputs: LayerInputs, state: Any) -> tuple[Array, Any]:
        own, outs, xs = state
        if inner is None:
            out = attention(inputs)
        else:
            out, own = inner.step(inputs, own)
        if outputs:
            b, _, t, _ = out.shape
            kept = jnp.moveaxis(out, 1, 2).reshape(b, t, -1)
            outs = (*outs, kept.astype(inputs.q.dtype))  # as the o projection gets it
        return out, (own, outs, xs)

    def behind(x: Array, state: Any) -> Any:
        own, outs, xs = state
        if inner is not None and inner.behind is not None:
            own = inner.behind(x, own)
        return own, outs, (*xs, x) if streams else xs

    start = None if inner is None else inner.state
    return Carrying(step, (start, (), ()), behind)


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
    return {
        name: jnp.mean(
            jnp.stack(
                [
                    relative_error(x[:, :-1], y[:, :-1], places)
                    for x, y in zip(one, other, strict=True)
                ]
            )
        )
        for name, (one, other) in pairs.items()
        if one
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
