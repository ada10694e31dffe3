"""What patterns choose by: means of blocks, the highest, and the fewest of a mass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.scorers.base import last_queries
from kvjax.types import NEG_INF, LayerInputs, Lengths


def block_means(
    x: Float[Array, "B H S D"], lengths: Lengths, block: int
) -> Float[Array, "B H N D"]:
    """Mean of the live tokens of each block in f32; 0 where there are none.

    Args:
        x: with zeros in padding.
        lengths: tokens of each row.
        block: tokens per block.
    """
    b, h, s, d = x.shape
    n = -(-s // block)
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, 0), (0, n * block - s), (0, 0)])
    live = jnp.clip(lengths[:, None] - jnp.arange(n) * block, 1, block)
    total = jnp.sum(x.reshape(b, h, n, block, d), axis=3)
    return total / live.astype(jnp.float32)[:, None, :, None]


def mean_logits(
    inputs: LayerInputs, lengths: Lengths, block: int
) -> Float[Array, "B H N N"]:
    """Products of mean queries and mean keys, scaled; all pairs of blocks.

    Args:
        inputs: with zeros in padding.
        lengths: tokens of each row.
        block: tokens per block.
    """
    q = block_means(inputs.q, lengths, block)
    k = block_means(inputs.k, lengths, block)
    b, h, n, d = q.shape
    grouped = q.reshape(b, k.shape[1], -1, n, d)
    logits = jnp.einsum("BKGXD,BKYD->BKGXY", grouped, k) * inputs.spec.scale
    return logits.reshape(b, h, n, n)


def line_mass(
    inputs: LayerInputs, count: int
) -> tuple[Float[Array, "B H S"], Float[Array, "B H S"]]:
    """Mass of each column, and of each diagonal by its distance `q - k`.

    Args:
        inputs: of the whole prompt.
        count: last queries of each row that it is summed over.
    """
    last, spec = last_queries(inputs, count, None), inputs.spec
    stats = column_stats(
        last.q,
        inputs.k,
        last.positions,
        inputs.positions,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        slash=True,
    )
    assert stats.slash is not None
    return stats.sum, stats.slash


def highest(
    scores: Float[Array, "*lead S"], count: int | Array
) -> Bool[Array, "*lead S"]:
    """The `count` highest of each row, ties to the left; never what is at -inf."""
    if isinstance(count, int) and count >= scores.shape[-1]:
        return scores > NEG_INF
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return (rank < count) & (scores > NEG_INF)


def fewest(
    mass: Float[Array, "*lead S"], wanted: Float[Array, "*lead 1"]
) -> Bool[Array, "*lead S"]:
    """The fewest of the largest that sum to `wanted`; of equal ones, all or none.

    Found bit by bit, as the highest threshold above which there is enough: without a
    sort, and whatever the order. Where all together are not enough, all above 0.

    Args:
        mass: not negative.
        wanted: none are kept where it is not above 0.

    Cost: 31 passes over `mass`.
    """
    mass = mass.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(mass, jnp.int32)  # in the order of the floats

    def narrower(n, edge):
        tried = edge | jnp.left_shift(jnp.int32(1), 30 - n)
        above = jnp.sum(jnp.where(bits >= tried, mass, 0), axis=-1, keepdims=True)
        return jnp.where(above >= wanted, tried, edge)

    edge = jnp.zeros((*mass.shape[:-1], 1), jnp.int32)
    edge = jax.lax.fori_loop(0, 31, narrower, edge)
    return (bits >= edge) & (mass > 0) & (wanted > 0)
