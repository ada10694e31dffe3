"""The custom gradient of an implementation, through `out` and through `lse`."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.partial import Partial


def with_gradient(
    forward: Callable[..., Partial],
    backward: Callable[..., tuple[Array, Array, Array]],
) -> Callable[..., Partial]:
    """`attend(q, k, v, pattern, q_start, kv_len, how)`, differentiable in q, k, v.

    Args:
        forward: takes the arguments of `attend`.
        backward: takes `(q, k, v, pattern, q_start, kv_len, d_out, lse, delta, how)`
            and returns `(dq, dk, dv)`. With `p = exp(logits - lse)` (rows without a
            key have lse `+inf` here, so p = 0), `dv = p^T d_out` and the gradient of
            a logit is `p * (d_out v^T - delta)`.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
    def attend(q, k, v, pattern, q_start, kv_len, how: Any) -> Partial:
        return forward(q, k, v, pattern, q_start, kv_len, how)

    def attend_fwd(q, k, v, pattern, q_start, kv_len, how: Any):
        part = forward(q, k, v, pattern, q_start, kv_len, how)
        return part, (q, k, v, pattern, q_start, kv_len, part)

    def attend_bwd(how: Any, residual: Any, cotangent: Partial):
        q, k, v, pattern, q_start, kv_len, part = residual
        lse, delta = row_terms(part, cotangent)
        d_out = cotangent.out.astype(q.dtype)
        dq, dk, dv = backward(q, k, v, pattern, q_start, kv_len, d_out, lse, delta, how)
        grads = (dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype))
        return (*grads, None, None, None)

    attend.defvjp(attend_fwd, attend_bwd)
    return cast(Callable[..., Partial], attend)


def row_terms(
    part: Partial, cotangent: Partial
) -> tuple[Float[Array, "B H T"], Float[Array, "B H T"]]:
    """`lse`, +inf where nothing is visible, and `delta` with `lse`'s cotangent."""
    empty = jnp.isneginf(part.lse)
    product = part.out.astype(jnp.float32) * cotangent.out.astype(jnp.float32)
    delta = jnp.sum(product, axis=-1) - cotangent.lse
    return jnp.where(empty, jnp.inf, part.lse), jnp.where(empty, 0.0, delta)
