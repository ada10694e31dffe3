"""Key bounds per page and Quest's score: the plain XLA path."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def page_bounds(
    keys: Float[Array, "B K S D"], live: Bool[Array, "B K S"], page: int
) -> tuple[Float[Array, "B K P D"], Float[Array, "B K P D"]]:
    """Channel-wise minimum and maximum of the live keys of each page.

    Pages without a live key get 0, so that their score stays finite.
    """
    b, k, s, d = keys.shape
    paged = keys.reshape(b, k, s // page, page, d)
    mask = live.reshape(b, k, s // page, page, 1)
    low = jnp.min(jnp.where(mask, paged, jnp.inf), axis=3)
    high = jnp.max(jnp.where(mask, paged, -jnp.inf), axis=3)
    empty = low > high
    zero = jnp.zeros((), keys.dtype)
    return jnp.where(empty, zero, low), jnp.where(empty, zero, high)


def page_scores(
    q: Float[Array, "B H T D"],
    low: Float[Array, "B K P D"],
    high: Float[Array, "B K P D"],
) -> Float[Array, "B K T P"]:
    """Upper bound on `q . k` over each page, the largest over a GQA group.

    `sum_c max(q_c low_c, q_c high_c)`, as two products: positive channels of the
    query meet the maximum, negative ones the minimum.
    """
    b, h, t, d = q.shape
    kv_heads = low.shape[1]
    grouped = q.reshape(b, kv_heads, h // kv_heads, t, d).astype(jnp.float32)
    up = jnp.einsum(
        "BKGTD,BKPD->BKGTP", jnp.maximum(grouped, 0), high.astype(jnp.float32)
    )
    down = jnp.einsum(
        "BKGTD,BKPD->BKGTP", jnp.minimum(grouped, 0), low.astype(jnp.float32)
    )
    return jnp.max(up + down, axis=2)
