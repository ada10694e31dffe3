"""Attention of whole rows in which later tokens see what a cache holds of earlier ones.

The XLA path of training. One pass serves plain causal attention and the parallel form
of a compressed cache: keys stay at their places in the row, and per (query, key) pair a
mask says whether the key is seen and whether as it was or as it is stored. Logits live
one block at a time, in both passes; the backward pass computes them again.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.pallas_kernels import held_blocks as blocks
from kvjax.pallas_kernels.dense import PREFIX, PREFIXES
from kvjax.pallas_kernels.held_blocks import How, KeyBlock, Queries, Slopes, StoredBlock
from kvjax.types import pytree


@pytree
class Stored:
    """Keys and values as a cache holds them, at the places of their tokens.

    Attributes:
        keys, values: `[B, K, T, D]`; anything where a token is not held.
        slot: `[B, K, T]` slot of the token.
        edge: `[B, T]` per query: slots below it are read as stored, the others plain.
    """

    keys: Float[Array, "B K T D"]
    values: Float[Array, "B K T D"]
    slot: Int[Array, "B K T"]
    edge: Int[Array, "B T"]


@pytree
class Earlier:
    """What tokens behind a row's compression point see of those before it.

    Attributes:
        behind: `[B, T]` which tokens those are.
        kept: `[B, K, T]` which earlier ones they see; what it says of others is not
            read.
        stored: what they have become; None if they are as they were.
        soft: `[B, K, T]`, zeros with a gradient: the effect that keeping the token has
            on the outputs behind the point, or would have. A token that is not kept
            would add `sigmoid(l - lse) (v - out)` with its logit `l`, exactly the
            difference that it makes; a kept one contributes `exp(l - lse) (v - out)`.
            None: no such gradient.
    """

    behind: Bool[Array, "B T"]
    kept: Bool[Array, "B K T"]
    stored: Stored | None = None
    soft: Float[Array, "B K T"] | None = None


def held_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    positions: Int[Array, "B T"],
    held: Earlier | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B H T D"]:
    """Causal attention of tokens in order, padding last; through `held` if given.

    Args:
        q: queries after RoPE; `H` is a multiple of `K`.
        k: keys.
        v: values.
        positions: rising; -1 is padding, which may hold anything and gives 0.
        held: what the later tokens of a row see of the earlier ones; None: everything.
        scale: factor on `q . k`.
        window: sliding window in tokens, or None.
        softcap: logit soft cap, or None.

    Returns:
        `[B, H, T, D]` in float32. Reverse mode only: the gradient is written by hand.

    Cost: `5/8 T^2` logits, once in the forward and once in the backward pass;
    temporaries linear in `T`.
    """
    live = (positions >= 0)[:, None, :, None]
    # Padding may hold NaN, and 0 * NaN in a product or a gradient is NaN.
    q, k, v = (jnp.where(live, x, 0) for x in (q, k, v))
    how = How(scale=scale, window=window, softcap=softcap)
    return _attention(how, _Arrays(q=q, k=k, v=v, positions=positions, held=held))


@pytree
class _Arrays:
    q: Array
    k: Array
    v: Array
    positions: Array
    held: Earlier | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: How, x: _Arrays) -> Array:
    return _forward(how, x)[0]


def _forward(how: How, x: _Arrays) -> tuple[Array, tuple[_Arrays, Array, Array]]:
    outs, lses = [], []
    for queries, keys in _prefixes(x):
        out, lse = blocks.on_platform(
            functools.partial(blocks.forward, how), (queries, keys)
        )
        outs.append(out)
        lses.append(lse)
    out, lse = jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)
    return out.reshape(x.q.shape), (x, out, lse)


def _backward(how: How, saved: tuple[_Arrays, Array, Array], slope: Array):
    x, out, lse = saved
    slope = slope.astype(jnp.float32).reshape(out.shape)
    delta = jnp.sum(slope * out, axis=-1)
    parts, start = [], 0
    for queries, keys in _prefixes(x):
        end = start + queries.q.shape[3]
        rest = (slope[:, :, :, start:end], lse[..., start:end], delta[..., start:end])
        backward = functools.partial(blocks.backward, how)
        d_q, slopes = blocks.on_platform(backward, (queries, keys), rest)
        width = functools.partial(_to_width, width=x.k.shape[2])
        parts.append((d_q, jax.tree.map(width, slopes)))
        start = end
    d_q = jnp.concatenate([d_q for d_q, _ in parts], axis=3).reshape(x.q.shape)
    slopes = jax.tree.map(lambda *d: sum(d[1:], d[0]), *(slopes for _, slopes in parts))
    return (_cotangents(x, d_q, slopes),)


_attention.defvjp(_forward, _backward)


def _cotangents(x: _Arrays, d_q: Array, slopes: Slopes) -> _Arrays:
    """Slopes in the tree of the arguments; None where there is no gradient."""
    held: Any = None
    if x.held is not None:
        held = jax.tree.map(lambda _: None, x.held)
        if slopes.stored is not None:
            assert x.held.stored is not None
            keys, values = (d.astype(x.held.stored.keys.dtype) for d in slopes.stored)
            stored = dataclasses.replace(held.stored, keys=keys, values=values)
            held = dataclasses.replace(held, stored=stored)
        held = dataclasses.replace(held, soft=slopes.soft)
    return _Arrays(
        q=d_q.astype(x.q.dtype),
        k=slopes.k.astype(x.k.dtype),
        v=slopes.v.astype(x.v.dtype),
        positions=None,  # type: ignore
        held=held,
    )


def _prefixes(x: _Arrays) -> Iterator[tuple[Queries, KeyBlock]]:
    """Parts of the queries, each with the keys up to its own end."""
    (b, h, t, d), kv_heads = x.q.shape, x.k.shape[1]
    held = x.held
    stored = None if held is None else held.stored
    size = max(PREFIX, -(-t // PREFIXES))
    for start in range(0, t, size):
        part, until = slice(start, min(start + size, t)), slice(min(start + size, t))
        q = x.q[:, :, part].reshape(b, kv_heads, h // kv_heads, -1, d)
        yield (
            Queries(
                q=q,
                positions=x.positions[:, part],
                behind=None if held is None else held.behind[:, part],
                edge=None if stored is None else stored.edge[:, part],
            ),
            KeyBlock(
                k=x.k[:, :, until],
                v=x.v[:, :, until],
                positions=x.positions[:, until],
                early=None if held is None else ~held.behind[:, until],
                kept=None if held is None else held.kept[:, :, until],
                stored=None if stored is None else _until(stored, until),
                choice=held is not None and held.soft is not None,
            ),
        )


def _until(stored: Stored, until: slice) -> StoredBlock:
    k, v, slot = (x[:, :, until] for x in (stored.keys, stored.values, stored.slot))
    return StoredBlock(k=k, v=v, slot=slot)


def _to_width(x: Array, width: int) -> Array:
    pad = [(0, 0)] * x.ndim
    pad[2] = (0, width - x.shape[2])
    return jnp.pad(x, pad)
