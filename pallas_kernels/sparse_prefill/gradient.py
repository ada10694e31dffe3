"""The custom gradient of an implementation, through `out` and through `lse`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs


def with_gradient(
    forward: Callable[..., Partial],
    backward: Callable[..., tuple[Array, Array, Array]],
) -> Callable[..., Partial]:
    """`attend(args, how)`, differentiable in `q`, `k` and `v` of a `SparseArgs`.

    Args:
        forward: takes the arguments of `attend`; `how` is static, what the
            implementation alone wants to know.
        backward: takes `(args, d_out, lse, delta, how)` and returns `(dq, dk, dv)`.
            With `p = exp(logits - lse)` (rows without a key have lse `+inf` here, so
            p = 0), `dv = p^T d_out` and the gradient of a logit is
            `p * (d_out v^T - delta)`.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def attend(args: SparseArgs, how: Any) -> Partial:
        return forward(args, how)

    def attend_fwd(args: SparseArgs, how: Any):
        part = forward(args, how)
        return part, (args, part)

    def attend_bwd(how: Any, residual: tuple[SparseArgs, Partial], cotangent: Partial):
        args, part = residual
        lse, delta = row_terms(part, cotangent)
        d_out = cotangent.out.astype(args.q.dtype)
        dq, dk, dv = backward(args, d_out, lse, delta, how)
        grads = dataclasses.replace(
            args,
            q=dq.astype(args.q.dtype),
            k=dk.astype(args.k.dtype),
            v=dv.astype(args.v.dtype),
            pattern=None,
            q_start=None,
            kv_len=None,
        )
        return (grads,)

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
