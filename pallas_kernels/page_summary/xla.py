"""Statistics per page in plain XLA; what is not used is not computed under `jit`."""

import jax.numpy as jnp

from kvjax.pallas_kernels.page_summary.summary import PageSummary


def page_summary(keys, live, *, page) -> PageSummary:
    """See `api.page_summary`."""
    b, k, s, d = keys.shape
    paged = keys.reshape(b, k, s // page, page, d)
    mask = live.reshape(b, k, s // page, page, 1)
    count = jnp.sum(mask, axis=3, dtype=jnp.float32)
    zero = jnp.zeros((), keys.dtype)

    def unless_empty(x):
        return jnp.where(count > 0, x, zero)

    total = jnp.sum(jnp.where(mask, paged, zero), axis=3, dtype=jnp.float32)
    return PageSummary(
        low=unless_empty(jnp.min(jnp.where(mask, paged, jnp.inf), axis=3)),
        high=unless_empty(jnp.max(jnp.where(mask, paged, -jnp.inf), axis=3)),
        mean=(total / jnp.maximum(count, 1)).astype(keys.dtype),
    )
