"""Rows of a batch in chunks, and what a model says of their tokens."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvjax.compress.config import Compression
from kvjax.models.chunked import Chunking
from kvjax.models.decoder import Decoder
from kvjax.models.prompts import NONE
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives.losses import TokenScores
from kvjax.train.objectives.replay import Arrays, Chunk, How, scores_in_chunks
from kvjax.train.recipe import TrainConfig
from kvjax.types import EMPTY


def chunked_scores(
    config: TrainConfig,
    c: Compression | None,
    model: Decoder,
    batch: TokenBatch,
    teacher: Decoder | None = None,
    wanted: Float[Array, "B T E"] | None = None,
) -> TokenScores:
    """`losses.token_scores` of rows that are read in chunks.

    Args:
        config: its `chunks`, `remat` and `loop_layers` count.
        c: what is done behind every chunk; None: nothing.
        model: a decoder.
        batch: the rows.
        teacher: to be compared with, or None.
        wanted: its hidden states.
    """
    assert config.chunks is not None
    width = batch.tokens.shape[1]
    size = min(config.chunks.size, width)
    shape = segmented(-(-width // size), config.chunks.segments)
    rows = _cut(batch, wanted, size, shape)
    total = size * math.prod(shape)
    graph, params = nnx.split(model)
    guide = (None, None) if teacher is None else nnx.split(teacher)
    how = How(
        model=graph,
        teacher=guide[0],
        chunking=Chunking.of(c or NONE, model.config.layers, total, model.dtype),
        remat=config.remat,
        unroll=not config.loop_layers,
    )
    found = scores_in_chunks(how, Arrays(params=params, guide=guide[1], rows=rows))

    def joined(x: Array) -> Array:  # [segments, chunks, B, T]
        x = jnp.moveaxis(x, 2, 0)
        return x.reshape(x.shape[0], -1)[:, : width - 1]

    return jax.tree.map(joined, found)


def segmented(chunks: int, segments: bool) -> tuple[int, int]:
    """Number of segments, and of the chunks of each: at least `chunks` together.

    Those that leave the fewest copies and the fewest chunks too many.
    """
    if not segments:
        return chunks, 1

    def cost(size: int) -> int:
        count = -(-chunks // size)
        return (count + size) * count * size

    size = min(range(1, min(chunks, 2 * math.isqrt(chunks) + 1) + 1), key=cost)
    return -(-chunks // size), size


def _cut(
    batch: TokenBatch, wanted: Array | None, size: int, shape: tuple[int, int]
) -> Chunk:
    """Rows as `[segments, chunks, B, T]`, padded behind."""
    rows, width = batch.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
    targets = jnp.pad(batch.tokens[:, 1:], [(0, 0), (0, 1)])

    def cut(x: Array, fill: int = 0) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, math.prod(shape) * size - width)
        x = jnp.pad(x, pad, constant_values=fill)
        x = x.reshape(rows, *shape, size, *x.shape[2:])
        return jnp.moveaxis(x, 0, 2)

    return Chunk(
        tokens=cut(batch.tokens),
        positions=cut(positions, EMPTY),
        targets=cut(targets),
        wanted=None if wanted is None else cut(jax.lax.stop_gradient(wanted)),
        start=jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape) * size,
    )
