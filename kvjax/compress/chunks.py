"""The parallel form of a prompt that is read in chunks: one layer, chunk by chunk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.compress import growing, rolling
from kvjax.compress.observe import Observed, observe
from kvjax.compress.rolling import Place
from kvjax.compress.survey import Layout, Share
from kvjax.types import EMPTY, LayerInputs, Lengths


def in_chunks(
    prompt: LayerInputs, lengths: Lengths, layout: Layout, share: Share, size: int
) -> tuple[Array, Observed]:
    """A layer reads its prompts in chunks.

    Args:
        prompt: the layer's queries, keys and values, at `EMPTY` where a row's prompt
            has ended.
        lengths: tokens of each prompt.
        layout: what is done.
        share: what each layer gets.
        size: tokens of a chunk.

    Returns:
        Attention `[B, H, T, D]` of the prompts' tokens; and what is held in the end.
    """
    b, h, tokens, d = prompt.q.shape
    multiple = layout.plan.chunk_multiple
    size = min(size, -(-tokens // multiple) * multiple)
    count = -(-tokens // size)
    drops = layout.plan.evict is not None
    asked = _chunk(prompt, jnp.int32(0), size)
    if drops:
        held = rolling.nothing_held(asked, layout)
    else:
        held = growing.nothing_held(asked, layout, count * size, differentiable=True)

    def step(held: Any, start: Array):
        asked = _chunk(prompt, start, size)
        seen = jnp.minimum(lengths, start + size)
        at = Place(column=start, seen=seen, lengths=lengths, share=share)
        if drops:
            out, held, _ = rolling.read(held, asked, at, layout)
        else:
            how = (held, asked, at, layout)
            out, held = growing.read(*how, differentiable=True)
        return held, out

    starts = jnp.arange(count, dtype=jnp.int32) * size
    held, outs = jax.lax.scan(jax.checkpoint(step), held, starts)
    out = jnp.moveaxis(outs, 0, 2).reshape(b, h, count * size, d)[:, :, :tokens]
    if drops:
        return out, rolling.observed_of(held, prompt.spec)
    # What is stored does not depend on who has read it.
    return out, observe(prompt, lengths, layout.plan, None)


def _chunk(prompt: LayerInputs, start: Array, size: int) -> LayerInputs:
    """`size` tokens from `start` on."""
    b, tokens = prompt.positions.shape
    index = start + jnp.arange(size)
    index = jnp.broadcast_to(index, (b, size))
    asked = prompt.taken(jnp.minimum(index, tokens - 1), index < tokens)
    live = (asked.positions != EMPTY)[:, None, :, None]
    # Padding may hold anything, and is stored with its block.
    k, v = jnp.where(live, asked.k, 0), jnp.where(live, asked.v, 0)
    return dataclasses.replace(asked, k=k, v=v)
