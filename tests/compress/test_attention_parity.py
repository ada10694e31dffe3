"""Attention ops against a plain softmax: merge, column sums, windows, chunks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels import dense
from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.pallas_kernels.dense import self_attention_with_mass
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.pallas_kernels.slots import attend_block, slot_mask
from tests.compress.samples import draw, layer_spec

SPEC = layer_spec(4, 2, 16)
LENGTHS = (70, 41)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
FORMS = {"plain": {}, "window": {"window": 9}, "softcap": {"softcap": 2.0}}
EDGES = (0, 7, 30, 31, 70)


def plain_softmax(q, k, *, window=None, softcap=None) -> np.ndarray:
    """Causal weights `[H, n, n]` of one row, written out."""
    n = q.shape[1]
    at, key = np.indices((n, n))
    seen = (key <= at) & (at - key < (window or n))
    weights = np.zeros((q.shape[0], n, n))
    for head in range(q.shape[0]):
        logits = q[head] @ k[head // SPEC.groups].T * SPEC.scale
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weight = np.where(seen, np.exp(logits - logits.max()), 0.0)
        weights[head] = weight / weight.sum(-1, keepdims=True)
    return weights


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_column_sums(form, chunked, monkeypatch):
    if chunked:  # sixteen queries at a time
        monkeypatch.setattr(dense, "LOGITS_BUDGET", 1)
    sample, options = draw(0, SPEC, LENGTHS, width=75), FORMS[form]
    x = sample.inputs
    given = {"scale": SPEC.scale} | options
    part, mass = self_attention_with_mass(x.q, x.k, x.v, x.positions, **given)
    assert mass is not None
    stats = column_stats(x.q, x.k, x.positions, x.positions, **given).sum
    last = column_stats(
        x.q[:, :, 30:41], x.k, x.positions[:, 30:41], x.positions, **given
    ).sum
    for row, n in enumerate(LENGTHS):
        q, k, v = sample.row(row)
        weights = plain_softmax(q, k, **options)
        values = np.repeat(v, SPEC.groups, axis=0)
        close(part.out[row, :, :n], weights @ values)
        for ours in (mass, stats):
            close(ours[row, :, :n], weights.sum(1))
            assert not np.asarray(ours)[row, :, n:].any()
        want = weights[:, 30:41].sum(1)
        close(last[row, :, :n], want)
        assert not np.asarray(part.out)[row, :, n:].any()


def pieces(q, k, v, positions, q_positions) -> list[Partial]:
    """Attention over the slots between `EDGES`."""
    parts = []
    for first, last in itertools.pairwise(EDGES):
        mask = slot_mask(q_positions, positions[:, :, first:last], None)
        keys, values = k[:, :, first:last], v[:, :, first:last]
        parts.append(attend_block(q, keys, values, mask, scale=SPEC.scale))
    return parts


def arrays():
    """Queries spread over the row, so that some parts are not visible to them."""
    x = draw(1, SPEC, (70, 70)).inputs
    at = jnp.asarray([[3, 6, 29, 69, -1]] * 2, jnp.int32)
    positions = jnp.broadcast_to(x.positions[:, None], x.k.shape[:3])
    q = jnp.take(x.q, jnp.maximum(at[0], 0), axis=2)
    return (q, x.k, x.v), (positions, at), x


def test_merge_is_the_whole_softmax_in_any_order():
    (q, k, v), (positions, at), x = arrays()
    whole = dense.causal_attention(q, k, v, at, x.positions, scale=SPEC.scale)
    parts, merged = jax.jit(pieces)(q, k, v, positions, at), jax.jit(merge)
    for order in itertools.permutations(parts):
        part = merged(order)
        close(part.out, whole.out)
        close(part.lse, whole.lse)
    assert not np.asarray(whole.out)[:, :, 4].any()
    assert np.isneginf(np.asarray(whole.lse)[:, :, 4]).all()


def test_merge_has_the_gradient_of_the_whole_softmax():
    tensors, (positions, at), x = arrays()
    weight = jax.random.normal(jax.random.key(0), tensors[0].shape)
    seen = (at >= 0)[:, None]

    def loss(part: Partial):
        # The log-sum-exp too: a cache part hands its own on.
        return jnp.sum(weight * part.out) + jnp.sum(jnp.where(seen, part.lse, 0.0))

    @jax.jit
    @jax.grad
    def of_whole(tensors):
        q, k, v = tensors
        return loss(dense.causal_attention(q, k, v, at, x.positions, scale=SPEC.scale))

    @jax.jit
    @jax.grad
    def of_parts(tensors):
        q, k, v = tensors
        parts = pieces(q, k, v, positions, at)
        return loss(merge([parts[i] for i in (2, 0, 3, 1)]))

    pairs = zip(of_parts(tensors), of_whole(tensors), strict=True)
    for ours, theirs in pairs:
        assert np.isfinite(np.asarray(ours)).all()
        close(ours, theirs)
