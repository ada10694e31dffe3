"""A gradient for the choice of tokens, which by itself has none.

What a body keeps is a ranking cut off at a budget. In the backward pass a token's score
gets the effect that keeping it would have (or has) on the output, through a sigmoid
around the cut; the effect is what `kvjax.pallas_kernels.held` gives the zeros made
here. The forward pass does not change.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.types import Scores

SMALL = 1e-6


def relaxed_choice(
    kept: Bool[Array, "B K S"], scores: Scores, temperature: float
) -> Float[Array, "B K S"]:
    """The relaxed choice minus its own value: 0, with a gradient for the scores.

    Args:
        kept: which tokens of the prompt were chosen.
        scores: what ranked them; `+inf` is always kept, `-inf` never, and neither gets
            a gradient.
        temperature: width of the sigmoid, in standard deviations of a head's scores.
    """
    finite = jnp.isfinite(scores)
    plain = jnp.where(finite, scores, 0.0)
    fixed = jax.lax.stop_gradient(plain)
    count = jnp.maximum(jnp.sum(finite, axis=-1, keepdims=True), 1)
    count = count.astype(jnp.float32)
    mean = jnp.sum(fixed, axis=-1, keepdims=True) / count
    square = jnp.where(finite, jnp.square(fixed - mean), 0.0)
    spread = jnp.sqrt(jnp.sum(square, axis=-1, keepdims=True) / count) + SMALL
    least = jnp.min(jnp.where(kept & finite, fixed, jnp.inf), -1, keepdims=True)
    most = jnp.max(jnp.where(~kept & finite, fixed, -jnp.inf), -1, keepdims=True)
    least = jnp.where(jnp.isfinite(least), least, most)
    most = jnp.where(jnp.isfinite(most), most, least)
    cut = jnp.where(jnp.isfinite(least), (least + most) / 2, 0.0)
    relaxed = jax.nn.sigmoid((plain - cut) / (temperature * spread))
    relaxed = jnp.where(finite, relaxed, 0.0)
    return relaxed - jax.lax.stop_gradient(relaxed)
