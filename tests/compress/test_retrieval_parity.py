"""Reads against their references: what is chosen, and what comes of it."""

import functools

import jax
import numpy as np
import pytest

from kvjax.cache import AbstractSelecting, Landmarks
from kvjax.codecs import LowRank
from kvjax.compress.config import Compression, Storage
from kvjax.reads import ExactTopK, InfLLM, RetroInfer, ShadowKV
from tests import reference
from tests.compress.samples import (
    SPECS,
    compressed,
    decode_inputs,
    draw,
    full_row,
    out_of,
    prefix,
)

LENGTHS = np.array([93, 64, 75])
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
GIVEN_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def asked(c: Compression, spec, seed: int):
    """Cache after prompts, their inputs with one more token, and the tokens chosen.

    The mask is of the slots of the first part, `[B, K, S]`.
    """
    whole = draw(seed, spec, tuple(LENGTHS + 1))
    cache = compressed(prefix(whole, LENGTHS), c)
    part, given = cache.parts[0], decode_inputs(whole, LENGTHS, 0)
    assert isinstance(part, AbstractSelecting)
    choose = jax.jit(lambda part: part.chosen(given.q, given.positions, spec))
    return cache, whole, np.asarray(choose(part))[:, :, 0]


def tokens_of(mask: np.ndarray, positions, length: int) -> np.ndarray:
    """Slots `[K, S]` as tokens of the prompt."""
    found = np.zeros((len(mask), length), bool)
    for head, at in enumerate(np.asarray(positions)):
        found[head, at[mask[head]]] = True
    return found


def everywhere(mask: np.ndarray, spec) -> np.ndarray:
    """`[K, S]` as what each query head may read, `[H, 1, S]`."""
    return np.repeat(mask, spec.groups, axis=0)[:, None]


@pytest.mark.sweep(1, 2)
@GIVEN_SPEC
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_exact_topk(spec, keep):
    c = Compression(read=ExactTopK(keep=keep, join=16))
    cache, whole, chosen = asked(c, spec, 11)
    ours = out_of(cache, whole, LENGTHS)
    for row, n in enumerate(LENGTHS):
        q, k, v = full_row(whole, row, n + 1)
        q, k, v = q[:, -1], k[:, :n], v[:, :n]
        body = n // 16 * 16
        mask = np.ones((len(k), n), bool)
        count = int(np.ceil(keep * body))
        mask[:, :body] = reference.exact_topk_mask(q, k[:, :body], count)
        found = tokens_of(chosen[row], cache.parts[0].positions[row], n)
        np.testing.assert_array_equal(found[:, :body], mask[:, :body])
        close(ours[row], reference.attend(q[:, None], k, v, everywhere(mask, spec)))


@pytest.mark.sweep(1, 2)
@GIVEN_SPEC
@pytest.mark.parametrize(("sinks", "local", "slots"), [(4, 12, 16), (0, 0, 8)])
def test_infllm(spec, sinks, local, slots):
    size, count = 8, 3
    sizes = {"size": size, "representatives": count, "slots": slots}
    read = InfLLM(keep=None, sinks=sinks, local=local, **sizes)
    cache, whole, chosen = asked(Compression(read=read), spec, 12)
    ours = out_of(cache, whole, LENGTHS)
    for row, n in enumerate(LENGTHS):
        q, k, v = full_row(whole, row, n + 1)
        body = n // size * size
        mask = np.ones((len(k), n), bool)
        mask[:, :body] = reference.infllm_mask(
            q[:, -1],
            k[:, :body],
            q[:, :n],
            k[:, :n],
            size=size,
            count=count,
            n_blocks=slots // size,
            sinks=sinks,
            local=local,
        )
        found = tokens_of(chosen[row], cache.parts[0].positions[row], n)
        np.testing.assert_array_equal(found[:, :body], mask[:, :body])
        assert not mask.all()
        args = (q[:, -1:], k[:, :n], v[:, :n], everywhere(mask, spec))
        close(ours[row], reference.attend(*args))


@pytest.mark.sweep(1, 2)
@GIVEN_SPEC
@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize(("outliers", "local"), [(2, 1), (0, 0)])
def test_shadowkv(spec, rank, outliers, local):
    """With plain keys, and with keys of which the leading components are held."""
    size = 8
    read = ShadowKV(size=size, slots=16, keep=None, outliers=outliers, local=local)
    width = spec.num_kv_heads * spec.head_dim
    store = Storage()
    if rank is not None:
        store = Storage(keys=LowRank(energy=1.0, keep=rank / width))
    cache, whole, chosen = asked(Compression(read=read, store=store), spec, 13)
    far, near = cache.parts
    assert isinstance(far, Landmarks)
    ours = out_of(cache, whole, LENGTHS)
    for row, n in enumerate(LENGTHS):
        q, k, v = full_row(whole, row, n + 1)
        q, k, v = q[:, -1:], k[:, :n], v[:, :n]
        exact, mask = reference.shadowkv_masks(
            q[:, 0], k, size=size, n_chunks=2, outliers=outliers, local=local
        )
        held = near.live_positions()[row]
        for head, want in enumerate(exact):
            np.testing.assert_array_equal(np.sort(held[head]), np.flatnonzero(want))
        found = tokens_of(chosen[row], far.positions[row], n)
        np.testing.assert_array_equal(found, mask)
        rebuilt = k
        if rank is not None:
            how = (spec.rope.frequencies(), np.arange(n))
            rebuilt = reference.low_rank_after_rope(k, rank, *how)
        keys = np.where(exact[..., None], k, rebuilt)
        allowed = everywhere(exact | mask, spec)
        want = reference.attend(q, keys, v, allowed)
        np.testing.assert_allclose(ours[row], want, rtol=1e-4, atol=1e-4)


@pytest.mark.sweep(1, 2)
@GIVEN_SPEC
@pytest.mark.parametrize(
    ("slots", "estimate", "sinks", "local"), [(20, 0.25, 4, 8), (6, 0.5, 0, 0)]
)
def test_retroinfer(spec, slots, estimate, sinks, local):
    segment, size = 32, 4
    sizes = {"segment": segment, "cluster": size, "iterations": 4}
    read = RetroInfer(
        keep=None, slots=slots, estimate=estimate, sinks=sinks, local=local, **sizes
    )
    cache, whole, chosen = asked(Compression(read=read), spec, 14)
    ours = out_of(cache, whole, LENGTHS)
    for row, n in enumerate(LENGTHS):
        q, k, v = full_row(whole, row, n + 1)
        body = n // segment * segment
        mask, want = reference.retroinfer_read(
            q[:, -1],
            k[:, :n],
            v[:, :n],
            budget=slots,
            estimate=int(np.ceil(estimate * (body // size))),
            sinks=sinks,
            local=local,
            **sizes,
        )
        found = tokens_of(chosen[row], cache.parts[0].positions[row], n)
        np.testing.assert_array_equal(found[:, :body], mask[:, :body])
        assert not mask.all()
        close(ours[row, :, 0], want)
