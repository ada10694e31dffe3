"""Sparse patterns of prefill against masks written out in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.dense import causal_attention
from kvjax.prefills.chosen import own
from kvjax.types import EMPTY, LayerInputs
from tests.compress.patterns import (
    PATTERNS,
    SPARSE,
    SPECS,
    attend,
    made,
    peaked,
    seen_by_hand,
    small,
    weights,
)
from tests.compress.samples import Sample, draw

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
EVERY = pytest.mark.parametrize("name", PATTERNS)


def wanted(sample: Sample, row: int, name: str, block: int) -> np.ndarray:
    """The reference's mask of a row."""
    (q, k, _), (kind, fields, mask) = sample.row(row), PATTERNS[name]
    spec, fields = sample.inputs.spec, {**fields, "block": block}
    if kind == "flex_prefill":  # which computes weights of single queries
        fields["softcap"] = spec.softcap
    return mask(q, k, window=spec.window, **fields)


@pytest.mark.sweep(2, 7)
@pytest.mark.parametrize("spec", SPECS)
@EVERY
def test_output_is_that_of_the_mask(name, spec):
    """Of ragged rows, of which padding holds NaN; with the mass of columns, too."""
    sample, block = peaked(3, SPECS[spec]), 16
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    out, none = attend(made(name, block), sample.inputs, lengths)
    masked, mass = attend(made(name, block), sample.inputs, lengths, True)
    assert none is None and mass is not None
    for row, n in enumerate(sample.lengths[:3]):
        mask = wanted(sample, row, name, block)
        if row == 0:  # it is neither all nor nothing
            share = mask.sum() / np.tril(np.ones_like(mask)).sum()
            assert 0.1 < share < 0.9, share
        weight = weights(sample, row, mask)
        v = np.repeat(sample.row(row)[2], SPECS[spec].groups, axis=0)
        close(out[row, :, :n], weight @ v)
        close(masked[row, :, :n], weight @ v)
        close(mass[row, :, :n], weight.sum(1))


@pytest.mark.sweep(1, 3)
@EVERY
def test_a_row_is_what_it_is_alone(name):
    sample, row = peaked(4, SPECS["full"]), 1
    n, prefill = sample.lengths[row], made(name)
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    both = attend(prefill, sample.inputs, lengths)[0]
    given, at = sample.inputs, slice(row, row + 1)
    cut = {name: getattr(given, name)[at, :, :n] for name in ("q", "k", "v")}
    one = dataclasses.replace(given, positions=given.positions[at, :n], **cut)
    alone = attend(prefill, one, lengths[row : row + 1])[0]
    close(both[row, :, :n], alone[0])


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("name", SPARSE)
def test_a_prefix_is_seen_in_full(name):
    """By absolute positions that do not begin at 0, nor at a block's start."""
    spec, before, tokens, block = SPECS["full"], 37, 96, 16
    whole = draw(5, spec, (before + tokens,)).inputs
    prefill = SPARSE[name](block=block, dense_below=0, **small(name))
    inputs = behind(whole, before)
    past = causal_attention(
        inputs.q,
        whole.k[:, :, :before],
        whole.v[:, :, :before],
        inputs.positions,
        whole.positions[:, :before],
        scale=spec.scale,
    )
    lengths = jnp.asarray([tokens], jnp.int32)
    out, _ = attend(prefill, inputs, lengths, False, past)
    masked, mass = attend(prefill, inputs, lengths, True, past)
    close(out, masked)
    # What the prompt sees of itself is what it sees without the prefix.
    mask = seen_by_hand(prefill, own(inputs), lengths)
    full = np.concatenate([np.ones((4, tokens, before), bool), mask], axis=2)
    sample = Sample(inputs=whole, lengths=np.array([before + tokens]))
    padded = np.zeros((4, before + tokens, before + tokens), bool)
    padded[:, before:], padded[:, :before, 0] = full, True
    weight = weights(sample, 0, padded)[:, before:]
    close(out[0], weight @ np.repeat(sample.row(0)[2], spec.groups, axis=0))
    close(mass[0], weight[..., before:].sum(1))


def behind(whole: LayerInputs, before: int) -> LayerInputs:
    """The tokens behind the first ones, at their own positions."""
    cut = {name: getattr(whole, name)[:, :, before:] for name in ("q", "k", "v")}
    return dataclasses.replace(whole, positions=whole.positions[:, before:], **cut)


@pytest.mark.sweep(1, 3)
@EVERY
def test_gradients_are_those_of_the_mask(name):
    """Padding, which holds NaN, gets and gives none."""
    sample = peaked(8, SPECS["full"], (100, 60), 104)
    lengths, prefill = jnp.asarray(sample.lengths, jnp.int32), made(name)
    live = (sample.inputs.positions >= 0)[:, None, :, None]
    turn = jnp.asarray(np.random.default_rng(9).normal(size=sample.inputs.q.shape))

    def total(arrays, mass: bool):
        inputs = dataclasses.replace(sample.inputs, **arrays)
        out = prefill.attend(inputs, lengths, mass)[0]
        return jnp.sum(jnp.where(live, out * turn, 0))

    arrays = {name: getattr(sample.inputs, name) for name in ("q", "k", "v")}
    slope = jax.jit(jax.grad(total), static_argnums=1)
    ours, masked = slope(arrays, False), slope(arrays, True)
    for side in arrays:
        close(ours[side], masked[side], atol=2e-4)
        assert not np.any(np.where(live, 0, ours[side]))
        assert np.any(ours[side])


def test_share_counts_blocks_and_columns():
    """Of the 55 pairs of blocks of 160 tokens and the 28 of 97."""
    sample = peaked(3, SPECS["full"])
    lengths, inputs = jnp.asarray(sample.lengths, jnp.int32), own(sample.inputs)

    @functools.partial(jax.jit, static_argnums=0)
    def shares(prefill):
        return prefill.choose(inputs, lengths).share(inputs)

    # 10 of the main diagonal, 9 and 8 beside it, the first column: 7 more.
    share = shares(made("a_shape"))
    np.testing.assert_allclose(share[0], 34 / 55, rtol=1e-6)
    np.testing.assert_allclose(share[1], (7 + 6 + 5 + 4) / 28, rtol=1e-6)
    slash = SPARSE["vertical_slash"](
        vertical=3, slash=1, last_q=8, first=3, local=1, block=16, dense_below=0
    )
    # A block's diagonal, and three columns in each of the 9 blocks below the first.
    want = (10 + 9 * 3 / 16) / 55
    np.testing.assert_allclose(shares(slash)[0], want, rtol=1e-6)


def test_padding_is_no_position():
    sample = peaked(3, SPECS["full"])
    inputs = own(sample.inputs)
    assert not np.isnan(np.asarray(inputs.k)).any()
    for row, n in enumerate(sample.lengths):
        np.testing.assert_array_equal(inputs.positions[row, :n], np.arange(n))
        assert (np.asarray(inputs.positions)[row, n:] == EMPTY).all()
