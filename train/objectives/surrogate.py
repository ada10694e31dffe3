"""A surrogate score: predict what later queries will look at, from the token alone.

The oracle of a token is the largest softmax weight that it gets from any later query of
its row, in any head of the group: what several questions about one context look at, so
it is query-agnostic. The evictor's head learns its logarithm.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.attention import causal_attention
from kvjax.models.decoder import Attending
from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.types import EMPTY, LayerInputs, Lengths

FLOOR = 1e-4
"""Added to oracle scores before the logarithm: what is smaller is all the same."""


def regressing(prompt_lengths: Lengths, later: int) -> Attending:
    """Plain attention; its state becomes the squared error, summed over the layers.

    Args:
        prompt_lengths: tokens that are scored; the queries behind them are the oracle.
        later: no row has more tokens behind them.

    Source: KVzap (mean squared error on log scores), Locret (2410.01805; the largest
    weight over the answers' queries). Deviations: every later query counts.
    """

    def step(inputs: LayerInputs, total: Array):
        assert inputs.retention is not None
        wanted = jnp.log(oracle(inputs, prompt_lengths, later) + FLOOR)
        miss = jnp.square(inputs.retention - jax.lax.stop_gradient(wanted))
        tokens = inputs.k.shape[2]
        counted = jnp.arange(tokens) < prompt_lengths[:, None, None]
        each = jnp.sum(jnp.where(counted, miss, 0.0), axis=(1, 2))
        count = prompt_lengths.astype(jnp.float32) * inputs.k.shape[1]
        mean = jnp.mean(each / count)
        share = mean / inputs.spec.num_layers
        return causal_attention(inputs), total + share, ()

    return Attending(step=step, state=jnp.zeros(()))


def oracle(
    inputs: LayerInputs, prompt_lengths: Lengths, later: int
) -> Float[Array, "B K T"]:
    """Largest weight of each key over the queries behind `prompt_lengths`."""
    b, h, tokens, _ = inputs.q.shape
    line = prompt_lengths[:, None] + jnp.arange(later)
    source = jnp.minimum(line, tokens - 1)
    queries = jnp.take_along_axis(inputs.q, source[:, None, :, None], axis=2)
    positions = jnp.take_along_axis(inputs.positions, source, axis=1)
    spec = inputs.spec
    stats = column_stats(
        queries,
        inputs.k,
        jnp.where(line < tokens, positions, EMPTY),
        inputs.positions,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
    )
    return jnp.max(stats.max.reshape(b, spec.num_kv_heads, spec.groups, -1), axis=2)
