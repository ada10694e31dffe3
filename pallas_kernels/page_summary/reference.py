"""Statistics per page, written out: the specification."""

import jax.numpy as jnp

from kvjax.pallas_kernels.page_summary.summary import PageSummary


def page_summary(keys, live, *, page) -> PageSummary:
    """See `api.page_summary`."""
    b, k, s, d = keys.shape
    paged = keys.astype(jnp.float32).reshape(b, k, s // page, page, d)
    mask = live.reshape(b, k, s // page, page, 1)
    count = jnp.sum(mask, axis=3, dtype=jnp.float32)
    low = jnp.min(jnp.where(mask, paged, jnp.inf), axis=3)
    high = jnp.max(jnp.where(mask, paged, -jnp.inf), axis=3)
    mean = jnp.sum(jnp.where(mask, paged, 0), axis=3) / jnp.maximum(count, 1)
    return PageSummary(
        *(jnp.where(count > 0, x, 0).astype(keys.dtype) for x in (low, high, mean))
    )
