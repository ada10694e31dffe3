"""Gradients of the sparse prefill against masked dense attention, written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.sparse_prefill import gradient
from kvjax.prefills import VerticalSlash, ranking
from tests.compress.samples import Sample, draw, layer_spec

CASES = {
    "block16": (16, (300, 177, 40), layer_spec(4, 2, 16)),
    "block32": (32, (450, 129, 333), layer_spec(6, 2, 16, softcap=3.0)),
    "block128": (128, (600, 400), layer_spec(4, 1, 16, window=290)),
}


def mask_of(columns: np.ndarray, diagonals: np.ndarray, block: int, window: int | None):
    """What a head may see, `[H, n, n]`: columns, and blocks of chosen diagonals."""
    heads, n = columns.shape
    at, key = np.indices((n, n))
    offset = at // block - key // block
    mask = np.repeat(columns[:, None], n, axis=1)
    for head in range(heads):
        for kept in np.flatnonzero(diagonals[head]):
            mask[head] |= np.isin(offset, np.unique(offset[at - key == kept]))
    mask &= key <= at
    return mask if window is None else mask & (at - key < window)


def dense(sample: Sample, row: int, mask: np.ndarray, d_out: np.ndarray):
    """Output of masked attention of a row and the gradient of `sum(out * d_out)`."""
    (q, k, v), spec = sample.row(row), sample.inputs.spec
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for head in range(spec.num_heads):
        kv = head // spec.groups
        logits = q[head] @ k[kv].T * spec.scale
        bent = np.ones_like(logits)
        if spec.softcap is not None:
            bent = 1 - np.tanh(logits / spec.softcap) ** 2
            logits = spec.softcap * np.tanh(logits / spec.softcap)
        weight = np.where(mask[head], np.exp(logits - logits.max()), 0.0)
        weight /= weight.sum(-1, keepdims=True)
        out[head] = weight @ v[kv]
        slope = d_out[head] @ v[kv].T
        slope = weight * (slope - (weight * slope).sum(-1, keepdims=True))
        slope *= bent * spec.scale
        dv[kv] += weight.T @ d_out[head]
        dq[head] = slope @ k[kv]
        dk[kv] += slope.T @ q[head]
    return out, dq, dk, dv


def with_padding(sample: Sample, filler: float) -> Sample:
    """The sample with padding that holds `filler`."""
    live = (sample.inputs.positions >= 0)[:, None, :, None]
    fields = {n: getattr(sample.inputs, n) for n in ("q", "k", "v")}
    filled = {n: jnp.where(live, x, filler) for n, x in fields.items()}
    return Sample(dataclasses.replace(sample.inputs, **filled), sample.lengths)


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_masked_dense_attention(case, monkeypatch):
    """By the op's own backward pass; padding that holds NaN gets and gives none."""
    block, lengths, spec = CASES[case]
    sample = with_padding(draw(5, spec, lengths, width=max(lengths) + 3), np.nan)
    prefill = VerticalSlash(
        vertical=12, slash=2, last_q=16, first=2, local=1, block=block, dense_below=0
    )
    backward, terms = [], gradient.row_terms
    note = lambda *args: backward.append(1) or terms(*args)  # noqa: E731
    monkeypatch.setattr(gradient, "row_terms", note)
    size = jnp.asarray(lengths, jnp.int32)
    d_out = np.random.default_rng(6).normal(size=sample.inputs.q.shape)
    live = sample.inputs.positions >= 0

    @jax.jit
    def run(q, k, v):
        inputs = dataclasses.replace(sample.inputs, q=q, k=k, v=v)
        out, back = jax.vjp(lambda x: prefill.attend(x, size, False)[0], inputs)
        out = jnp.where(live[:, None, :, None], out, 0)
        given = jnp.where(live[:, None, :, None], jnp.asarray(d_out, jnp.float32), 0)
        slope = back(given)[0]
        return out, slope.q, slope.k, slope.v, prefill.pattern(inputs, size)

    *found, chosen = run(sample.inputs.q, sample.inputs.k, sample.inputs.v)
    assert backward, "the op's custom gradient was not used"
    columns, diagonals = map(np.asarray, chosen)
    for row, n in enumerate(lengths):
        mask = mask_of(columns[row, :, :n], diagonals[row, :, :n], block, spec.window)
        share = mask.sum() / (len(mask) * n * (n + 1) / 2)
        assert row or share < 0.85  # the longest row is sparse
        wanted = dense(sample, row, mask, d_out[row, :, :n])
        for ours, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours[row, :, :n], want, rtol=1e-4, atol=1e-5)
            assert not np.asarray(ours)[row, :, n:].any()


def test_the_choice_of_blocks_is_not_differentiated(monkeypatch):
    """`column_stats` has no gradient on every backend, and needs none here."""
    stats = ranking.column_stats

    def blunt(queries, keys, *args, **kwargs):
        run = jax.custom_jvp(lambda q, k: stats(q, k, *args, **kwargs))

        @run.defjvp
        def _(primals, tangents):
            raise AssertionError("the choice is differentiated")

        return run(queries, keys)

    monkeypatch.setattr(ranking, "column_stats", blunt)
    sample = draw(5, CASES["block16"][2], (64, 40))
    prefill, size = (
        VerticalSlash(block=16, dense_below=0),
        jnp.asarray(sample.lengths, jnp.int32),
    )

    def total(q, k):
        inputs = dataclasses.replace(sample.inputs, q=q, k=k)
        return jnp.sum(prefill.attend(inputs, size, False)[0])

    slopes = jax.jit(jax.grad(total, (0, 1)))(sample.inputs.q, sample.inputs.k)
    assert all(np.any(slope) for slope in slopes)
