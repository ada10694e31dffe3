"""The exact union of attention over splits of one list of slots."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.partial import Partial
from kvjax.types import NEG_INF


def union(out: Float[Array, "B K P X D"], lse: Float[Array, "B K P X"]) -> Partial:
    """Attention over all splits, axis 2; those that saw nothing weigh nothing."""
    peak = jnp.max(lse, axis=2, keepdims=True)
    anchor = jnp.where(jnp.isneginf(peak), 0.0, peak)  # -inf - -inf is NaN
    weight = jnp.exp(lse - anchor)
    total = jnp.sum(weight, axis=2)
    safe = jnp.where(total > 0, total, 1.0)
    whole = jnp.sum(weight[..., None] * out, axis=2) / safe[..., None]
    found = jnp.where(total > 0, anchor[:, :, 0] + jnp.log(safe), NEG_INF)
    return Partial(whole, found)
