"""Dynamic memory sparsification: training a model to give up tokens.

Every token of every KV head is given up with a probability that the model says itself;
`window` tokens later its columns get the log-weight `log(1 - a)` of a relaxed draw `a`.
A one-sided term asks for as many as the ratio needs; the loss pays for those that are
missed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import self_attention
from kvjax.models.decoder import Attending
from kvjax.train.recipe import DMSConfig
from kvjax.types import LayerInputs, Lengths


def relaxed(
    config: DMSConfig, lengths: Lengths, step: Int[Array, ""], seed: int = 0
) -> Attending:
    """Attention under relaxed evictions; its state becomes the mean `shortfall`.

    Args:
        config: window, ratio, temperature.
        lengths: tokens of each row that the ratio counts, `[B]`.
        step: of the training; drives the ramp and, with the seed, the draws.
        seed: of the run.
    """

    def attention(inputs: LayerInputs, total: Array):
        spec = inputs.spec
        assert inputs.retention is not None
        evict = -inputs.retention
        missing = shortfall(evict, config, lengths, step) / spec.num_layers
        key = jax.random.fold_in(jax.random.key(seed), step)
        key = jax.random.fold_in(key, inputs.depth.layer)
        noise = jax.random.logistic(key, evict.shape)
        # log(1 - sigmoid(x)), without a difference that rounds to zero.
        weight = -jax.nn.softplus((evict + noise) / config.temperature)

        def bias(q_positions: Array, k_positions: Array) -> Array:
            distance = q_positions[:, :, None] - k_positions[:, None, :]
            late = (distance >= config.window)[:, None]
            near = weight[:, :, None, : k_positions.shape[1]]
            return jnp.where(late, near, 0.0)

        out, _ = self_attention(inputs, bias=bias)
        return out, total + missing, ()

    return Attending(step=attention, state=jnp.zeros(()))


def shortfall(
    evict: Float[Array, "B K T"],
    config: DMSConfig,
    lengths: Lengths,
    step: Int[Array, ""],
) -> Float[Array, ""]:
    """Share of the tokens that should have been given up and were not, over rows.

    A row of `n` tokens may keep `n / ratio`, its last `window` among them.
    """
    share = jnp.minimum((step.astype(jnp.float32) + 1.0) / max(config.ramp, 1), 1.0)
    ratio = 1.0 + (config.ratio - 1.0) * share
    tokens = lengths.astype(jnp.float32)
    outside = jnp.maximum(tokens - config.window, 1.0)
    allowed = jnp.maximum(tokens / ratio - config.window, 0.0)
    wanted = 1.0 - allowed / outside
    counted = jnp.arange(evict.shape[-1]) < (lengths - config.window)[:, None]
    chance = jnp.where(counted[:, None], jax.nn.sigmoid(evict), 0.0)
    given = jnp.sum(jnp.mean(chance, axis=1), axis=-1) / outside
    return jnp.mean(jnp.maximum(wanted - given, 0.0))
