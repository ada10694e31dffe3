"""Dense causal attention in O(S) memory: the XLA path of prefill and training."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.pallas_kernels.partial import Partial, cap, softmax_weights

LOGITS_BUDGET = 1 << 24
"""Logits of one query chunk (elements); bounds temporaries, grows no loop below 4k."""

PREFIX, PREFIXES = 256, 4
"""Queries of a part of `self_attention_with_mass` at least, and parts at most."""


def visible(
    q_positions: Int[Array, "*lead T"],
    k_positions: Int[Array, "*lead S"],
    window: int | None = None,
) -> Bool[Array, "*lead T S"]:
    """Which keys each query may see: live, not later, and inside the window."""
    q, k = q_positions[..., :, None], k_positions[..., None, :]
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (q - k < window)


def query_chunk(tokens: int, logits_per_query: int) -> int:
    """Queries per chunk so that one chunk's logits stay inside `LOGITS_BUDGET`."""
    return int(min(tokens, max(16, LOGITS_BUDGET // max(logits_per_query, 1))))


def map_query_chunks(
    fn: Callable[..., tuple[Partial, Any]], chunk: int, *arrays: Array
) -> tuple[Partial, Any]:
    """Run `fn` over slices of the query axis (axis 1 of every array) and rejoin.

    Args:
        fn: takes the slices, `[B, chunk, ...]` each, and returns `(part, total)`: a
            `Partial` with `[..., chunk, D]` and `[..., chunk]`, and a pytree that is
            summed over the chunks (`()` for none).
        chunk: queries per slice; the last slice is padded with zeros (int: -1).
        arrays: `[B, T, ...]`.

    Each chunk is rematerialised in the backward pass, so training keeps O(S) too.
    """
    tokens = arrays[0].shape[1]
    if chunk >= tokens:
        return fn(*arrays)
    count = -(-tokens // chunk)

    def split(x: Array) -> Array:
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        pad = [(0, 0), (0, count * chunk - tokens)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    slices = tuple(split(x) for x in arrays)
    first = jax.tree.map(lambda x: x[0], slices)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(fn, *first)[1])

    def step(total, xs):
        part, more = jax.checkpoint(fn)(*xs)
        return jax.tree.map(jnp.add, total, more), part

    total, parts = jax.lax.scan(step, zero, slices)
    out = jnp.moveaxis(parts.out, 0, -3)
    lse = jnp.moveaxis(parts.lse, 0, -2)
    out = out.reshape(*out.shape[:-3], count * chunk, out.shape[-1])
    lse = lse.reshape(*lse.shape[:-2], count * chunk)
    return Partial(out[..., :tokens, :], lse[..., :tokens]), total


def causal_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    allowed: Callable[[Array, Array], Array] | None = None,
    bias: Callable[[Array, Array], Array] | None = None,
) -> Partial:
    """Softmax attention of queries over keys at their absolute positions.

    Args:
        q: queries after RoPE, `[B, H, T, D]`; `H` is a multiple of `K`.
        k: keys, `[B, K, S, D]`.
        v: values, `[B, K, S, D]`.
        q_positions: absolute positions of the queries; -1 is padding.
        k_positions: absolute positions of the keys; -1 is padding.
        scale: factor on `q . k`.
        window: sliding window in tokens, or None.
        softcap: logit soft cap, or None.
        allowed: a sparse pattern on top, `(q_positions [B, t], k_positions [B, S])`
            to a mask `[B, H, t, S]`.
        bias: the same to log-weights `[B, K or 1, t, S]`, added to the capped logits.

    Returns:
        `Partial(out [B, H, T, D] f32, lse [B, H, T] f32)`; padding queries give 0.

    Cost: `O(T S)` work, temporaries linear in `S`.
    """
    how = {"scale": scale, "window": window, "softcap": softcap}
    how |= {"allowed": allowed, "bias": bias}
    return _attend(q, k, v, q_positions, k_positions, mass=False, **how)[0]


def self_attention_with_mass(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    allowed: Callable[[Array, Array], Array] | None = None,
    bias: Callable[[Array, Array], Array] | None = None,
    mass: bool = True,
    elsewhere: Float[Array, "B H T"] | None = None,
) -> tuple[Partial, Float[Array, "B H T"] | None]:
    """Tokens in order over themselves, padding last; and what each key received.

    The queries go in up to `PREFIXES` parts, each over the keys up to its own end:
    five eighths of the work of all queries over all keys. The column sums come from the
    weights that the pass computes anyway: one more matrix-vector product per chunk, and
    no T x T matrix.

    Args:
        q: queries after RoPE.
        k: keys.
        v: values.
        positions: rising; -1 is padding.
        scale: factor on `q . k`.
        window: sliding window in tokens, or None.
        softcap: logit soft cap, or None.
        allowed: a sparse pattern on top, `(q_positions [B, t], k_positions [B, s])` to
            a mask `[B, H or 1, t, s]`; the keys are the first `s` of the row.
        bias: the same to log-weights `[B, K or 1, t, s]`, added to the capped logits.
        mass: whether column sums are wanted.
        elsewhere: log-sum-exp of what the queries pay to other keys, which column sums
            leave room for; None: there are none.
    """
    tokens = q.shape[2]
    parts, sums = [], []
    size = max(PREFIX, -(-tokens // PREFIXES))
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        part, received = _attend(
            q[:, :, start:end],
            k[:, :, :end],
            v[:, :, :end],
            positions[:, start:end],
            positions[:, :end],
            scale=scale,
            window=window,
            softcap=softcap,
            allowed=allowed,
            bias=bias,
            mass=mass,
            elsewhere=None if elsewhere is None else elsewhere[:, :, start:end],
        )
        parts.append(part)
        if received is not None:
            sums.append(jnp.pad(received, [(0, 0), (0, 0), (0, tokens - end)]))
    joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *parts)
    return joined, functools.reduce(jnp.add, sums) if mass else None


def _attend(
    q,
    k,
    v,
    q_positions,
    k_positions,
    *,
    scale,
    window,
    softcap,
    mass,
    allowed=None,
    bias=None,
    elsewhere=None,
):
    """Attention in chunks of queries, over all keys."""
    (b, h, t, d), (kv_heads, s) = q.shape, k.shape[1:3]
    groups = h // kv_heads
    live = (k_positions >= 0)[:, None, :, None]
    # Padding may hold NaN: clear it, since 0 * NaN in a product or a gradient is NaN.
    k, v = jnp.where(live, k, 0), jnp.where(live, v, 0)
    keys = jnp.swapaxes(k, -1, -2)

    def attend(q_chunk: Array, positions: Array, *others: Array) -> tuple[Partial, Any]:
        # [B, chunk, H, D] -> [B, K, G * chunk, D]: one GEMM per KV head.
        n = q_chunk.shape[1]
        queries = jnp.moveaxis(q_chunk, 1, 2).reshape(b, kv_heads, groups * n, d)
        logits = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)
        mask = visible(positions, k_positions, window)[:, None, None]
        if allowed is not None:
            pattern = allowed(positions, k_positions)
            pattern = jnp.broadcast_to(pattern, (b, h, n, s))
            mask = mask & pattern.reshape(b, kv_heads, groups, n, s)
        mask = jnp.broadcast_to(mask, (b, mask.shape[1], groups, n, s))
        mask = mask.reshape(b, -1, groups * n, s)
        logits = cap(logits * scale, softcap)
        if bias is not None:
            logits = logits + jnp.tile(bias(positions, k_positions), (1, 1, groups, 1))
        part, weight, share = softmax_weights(logits, mask, v)
        part = Partial(part.out.reshape(b, h, n, d), part.lse.reshape(b, h, n))
        if not mass:
            return part, ()
        weight = weight.reshape(b, h, n, s)
        share = share.reshape(b, h, n)
        for other in others:
            other = jnp.moveaxis(other, 2, 1)
            joint = jnp.logaddexp(part.lse, other)
            # Padding sees nothing on either side: 0, and not inf - inf.
            joint = jnp.where(jnp.isneginf(joint), 0.0, joint)
            share = share * jnp.exp(part.lse - joint)
        return part, jnp.einsum("BHTS,BHT->BHS", weight, share)

    chunk = query_chunk(t, b * h * s)
    live_q = (q_positions >= 0)[:, None, :, None]
    queries = jnp.moveaxis(jnp.where(live_q, q, 0), 2, 1)
    others = () if elsewhere is None else (jnp.moveaxis(elsewhere, 2, 1),)
    part, total = map_query_chunks(attend, chunk, queries, q_positions, *others)
    return part, total if mass else None
