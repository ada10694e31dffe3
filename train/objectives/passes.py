"""Passes over rows of tokens in training, and what is kept of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kvjax.attention import causal_attention
from kvjax.depth import in_order
from kvjax.models.decoder import Attending, Attention, Decoder, Pass, attending
from kvjax.models.sharding import TRAINING
from kvjax.train.recipe import ObjectiveConfig
from kvjax.types import LayerInputs, Tokens, pytree

ROWS = PartitionSpec(TRAINING["batch"])
"""How rows lie on the mesh of a run."""

HELD = PartitionSpec(None, TRAINING["batch"], TRAINING["kv_heads"])
"""How what layers hold of rows does, `[layers, B, K, ...]`."""


def pass_over(
    model: Decoder,
    tokens: Tokens,
    attention: Attention | Attending,
    *,
    remat: bool = False,
    loop: bool = False,
    streams: bool = False,
) -> Pass:
    """A pass that may have a backward pass, its rows split over the devices.

    Args:
        model: a decoder.
        tokens: `[B, T]`, in order from position 0.
        attention: what it attends by.
        remat: recompute layers in the backward pass.
        loop: compile equal layers once.
        streams: keep the residual stream behind every layer.
    """
    rows, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    return model.run(
        tokens,
        positions,
        attention,
        trained=True,
        remat=remat,
        unroll=not loop,
        streams=streams,
        place=along_rows,
    )


def plain_states(
    model: Decoder, tokens: Tokens, *, loop: bool = False
) -> Float[Array, "B T E"]:
    """Hidden states of every token where nothing is compressed and nothing watched."""
    return pass_over(model, tokens, causal_attention, loop=loop).hidden


def along_rows(x: Array) -> Array:
    """A pass's `[B, ...]` split over the devices along its rows.

    In a loop over layers the partitioner would rather split the width, as the weights
    are, and keep all rows on every device. Without a mesh nothing happens.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, ROWS)


def held_along_rows[T](tree: T) -> T:
    """What layers hold of rows, split over the devices along rows and heads."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def put(x: Array) -> Array:
        if x.ndim < 2:
            return x
        # Only what has an axis behind the heads has heads.
        where = HELD if x.ndim > len(HELD) else PartitionSpec(*HELD[:2])
        return jax.lax.with_sharding_constraint(x, where)

    return jax.tree.map(put, tree)


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
    every = bool(config.hidden) and config.hidden_layers == "all"
    if config.attention:
        attention = _outputs(attention)
    found = pass_over(model, tokens, attention, remat=remat, loop=loop, streams=every)
    last, hidden, outputs = found.hidden, None, None
    if config.hidden:
        hidden = last[None]
    if every:
        hidden = in_order(found.loops, found.streams).at[-1].set(last)
    if config.attention:
        outputs = in_order(found.loops, found.left)
    return Watched(last=last, hidden=hidden, attention=outputs, state=found.state)


def _outputs(attention: Attention | Attending) -> Attending:
    """`attention` that leaves what the o projection gets."""
    inner = attending(attention)

    def step(inputs: LayerInputs, state: Any):
        out, state, _ = inner.step(inputs, state)
        b, _, t, _ = out.shape
        kept = jnp.moveaxis(out, 1, 2).reshape(b, t, -1)
        return out, state, kept.astype(inputs.q.dtype)

    return dataclasses.replace(inner, step=step)
