"""Reads, sparse prefill and cache layouts against their references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.budgets import Uniform
from kvjax.cache import KeysOnly, LayerCache, Pages, Ragged, Slots
from kvjax.codecs import Affine, AffineArray, PlainArray
from kvjax.compress.config import Compression, Eviction, Storage
from kvjax.pallas_kernels.page_score import page_score
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.pallas_kernels.quantized import numbers
from kvjax.prefills import VerticalSlash
from kvjax.reads import Quest
from kvjax.schedules import EveryTokens
from kvjax.scorers import H2O, KNorm
from kvjax.types import EMPTY
from kvjax.units import Chunk
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

LENGTHS = np.array([75, 48, 61])
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
ATTEND = jax.jit(LayerCache.attend)
GIVEN_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@GIVEN_SPEC
def test_page_bounds(spec):
    sample, page = draw(0, spec, (64, 64)), 16
    q, k = sample.inputs.q[:, :, -1:], sample.inputs.k
    low, high, _ = page_summary(k, jnp.ones(k.shape[:3], bool), page=page)
    ours = np.asarray(page_score(q, low, high, mode="bound", group="max"))[:, :, 0]
    for row in range(2):
        queries, keys, _ = sample.row(row)
        bounds = reference.quest_bounds(queries[:, -1], keys, page=page)
        grouped = bounds.reshape(spec.num_kv_heads, -1, 4).max(axis=1)
        close(ours[row], grouped)
        for head in range(spec.num_heads):
            kv = head // spec.groups
            products = (keys[kv] @ queries[head, -1]).reshape(4, page).max(-1)
            assert (ours[row, kv] >= products - 1e-4).all()


@pytest.mark.sweep(3, 6)
@GIVEN_SPEC
@pytest.mark.parametrize("keep", [0.1, 0.4, 1.0])
def test_quest_reads_the_best_pages(spec, keep):
    whole = draw(1, spec, tuple(LENGTHS + 1))
    sample, page = prefix(whole, LENGTHS), 16
    read = Quest(page=page, keep=keep)
    cache = compressed(sample, Compression(read=read))
    assert isinstance(cache.parts[0], Pages)
    ours = out_of(cache, whole, LENGTHS)
    for row, length in enumerate(LENGTHS):
        q = full_row(whole, row, length + 1)[0][:, -1:]
        _, k, v = sample.row(row)
        paged = length // page * page
        bounds = reference.quest_bounds(q[:, 0], k[:, :paged], page=page)
        shared = bounds.reshape(spec.num_kv_heads, spec.groups, -1).max(axis=1)
        pages = reference.quest_pages(shared, int(np.ceil(keep * paged / page)))
        tokens = np.ones((spec.num_kv_heads, length), bool)  # the open page is read
        tokens[:, :paged] = reference.page_mask(pages, paged, page=page)
        allowed = np.repeat(tokens, spec.groups, axis=0)[:, None]
        assert keep == 1.0 or not tokens.all()
        theirs = reference.attend(q, k, v, allowed)
        close(ours[row], theirs)


@pytest.mark.sweep(2, 4)
@GIVEN_SPEC
@pytest.mark.parametrize("last_q", [16, 64])
def test_vertical_slash(spec, last_q):
    sizes = {"vertical": 32, "slash": 50, "last_q": last_q}
    sample = draw(2, spec, (96, 70, 55), width=100)
    prefill = VerticalSlash(**sizes, first=5, local=12, block=1, dense_below=0)
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    pattern = jax.jit(prefill.pattern)(sample.inputs, lengths)
    columns, diagonals = map(np.asarray, pattern)
    attend = jax.jit(prefill.attend, static_argnums=2)
    out = np.asarray(attend(sample.inputs, lengths, False)[0])
    for row, length in enumerate(sample.lengths):
        q, k, v = sample.row(row)
        mask = reference.vertical_slash_mask(
            q, k, **sizes, forced_verticals=5, forced_slashes=12
        )
        at, key = np.indices((length, length))
        ours = columns[row][:, key] | diagonals[row][:, np.abs(at - key)]
        np.testing.assert_array_equal(ours & (key <= at), mask)
        assert length < 96 or not mask[:, key <= at].all()
        want = reference.attend(q, k, v, mask)
        close(out[row, :, :length], want)


@pytest.mark.sweep(2, 4)
@GIVEN_SPEC
@pytest.mark.parametrize(("block", "sizes"), [(8, (3, 2, 4, 3)), (16, (20, 1, 0, 0))])
def test_vertical_slash_in_blocks(spec, block, sizes):
    """Widened as a NumPy mask says; with the mass of every column, the same."""
    vertical, slash, first, local = sizes
    sample = draw(2, spec, (96, 70, 55), width=100)
    prefill = VerticalSlash(
        vertical=vertical,
        slash=slash,
        last_q=16,
        first=first,
        local=local,
        block=block,
        dense_below=0,
    )
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    pattern = jax.jit(prefill.pattern)(sample.inputs, lengths)
    columns, diagonals = map(np.asarray, pattern)
    attend = jax.jit(prefill.attend, static_argnums=2)
    out, none = attend(sample.inputs, lengths, False)
    masked, mass = attend(sample.inputs, lengths, True)
    assert none is None and mass is not None
    for row, length in enumerate(sample.lengths):
        q, k, v = sample.row(row)
        at, key = np.indices((length, length))
        mask = columns[row][:, key]
        for head in range(len(mask)):
            for kept in np.flatnonzero(diagonals[row][head]):
                there = at - key == kept
                near = np.unique((at // block - key // block)[there])
                mask[head] |= np.isin(at // block - key // block, near)
        mask &= key <= at
        assert length < 96 or not mask[:, key <= at].all()
        want = reference.attend(q, k, v, mask)
        close(np.asarray(out)[row, :, :length], want)
        close(np.asarray(masked)[row, :, :length], want)


@pytest.mark.parametrize(("heavy", "recent"), [(12, 8), (20, 0), (0, 16)])
def test_h2o_decode_loop(heavy, recent):
    spec, steps, prompts = SPECS["d16_g2"], 24, np.array([40, 14, 29])
    whole = draw(3, spec, tuple(prompts + steps))
    evict = Eviction(
        score=H2O(normalize=False, recent=recent),
        budget=Uniform(slots=heavy + recent),
    )
    c = Compression(evict=evict, schedule=EveryTokens(interval=1))
    cache = compressed(prefix(whole, prompts), c)
    traces = [
        reference.h2o_decode(
            *full_row(whole, row, n + steps), prompt=n, heavy=heavy, recent=recent
        )
        for row, n in enumerate(prompts)
    ]
    check_kept(cache, traces, 0)
    for step in range(steps):
        out, cache = ATTEND(cache, decode_inputs(whole, prompts, step))
        for row, trace in enumerate(traces):
            want = trace.outputs[:, step]
            close(out[row, :, 0], want)
        check_kept(cache, traces, step + 1)


def check_kept(cache: LayerCache, traces, step: int) -> None:
    """The positions of every row and head are those of the loop after `step`."""
    parts = (cache.parts[0].live_positions(), cache.tail.live_positions())
    for row, trace in enumerate(traces):
        for head, want in enumerate(trace.kept[step]):
            held = np.concatenate([part[row][head] for part in parts])
            np.testing.assert_array_equal(np.sort(held), want)


@pytest.mark.sweep(3, 6)
@GIVEN_SPEC
@pytest.mark.parametrize(("keys", "values"), [(0.5, 0.25), (1.0, 0.1), (0.3, 0.3)])
def test_decoupled_keys_and_values(spec, keys, values):
    whole = draw(4, spec, tuple(LENGTHS + 1))
    sample = prefix(whole, LENGTHS)
    budgets = {"budget": Uniform(keep=keys), "values": Uniform(keep=values)}
    evict = Eviction(score=KNorm(), budget=budgets["budget"], values=budgets["values"])
    cache = compressed(sample, Compression(evict=evict))
    ours = out_of(cache, whole, LENGTHS)
    assert len(cache.parts) == 1 or isinstance(cache.parts[1], KeysOnly)
    both = cache.parts[0].live_positions()
    rest = cache.parts[-1].live_positions()
    for row, length in enumerate(LENGTHS):
        q = full_row(whole, row, length + 1)[0][:, -1:]
        _, k, v = sample.row(row)
        scores = reference.score_knorm(q, k, v)
        row_length = np.array([length])
        with_key, with_value = (
            reference.kept(scores, int(budget.counts(row_length, (spec,), 0.0)[0, 0]))
            for budget in budgets.values()
        )
        for head in range(spec.num_kv_heads):
            held = np.union1d(both[row][head], rest[row][head])
            np.testing.assert_array_equal(held, with_key[head])
            np.testing.assert_array_equal(both[row][head], with_value[head])
        theirs = reference.attend_decoupled(q, k, v, with_key, with_value)
        close(ours[row], theirs)


@GIVEN_SPEC
def test_whole_chunks_are_not_cut_to_the_budget(spec):
    """Three of six chunks are kept, though 30 tokens are one more than half of 57."""
    lengths = (57, 40, 57)
    sample = draw(7, spec, lengths)
    unit = Chunk(size=10, reduce="mean", share_heads=True, whole=True)
    evict = Eviction(score=KNorm(), unit=unit, budget=Uniform(keep=0.5))
    held = compressed(sample, Compression(evict=evict)).parts[0].live_positions()
    assert 30 in [len(row[0]) for row in held]
    for row in range(len(lengths)):
        scores = reference.score_knorm(*sample.row(row))
        theirs = reference.chunkkv_kept(scores, 0.5, chunk=10)
        for ours, want in zip(held[row], theirs, strict=True):
            np.testing.assert_array_equal(ours, want)


@GIVEN_SPEC
def test_ragged_heads(spec):
    """Heads with many, few and no tokens; free slots behind them hold NaN."""
    rng, slots = np.random.default_rng(5), 90
    whole = draw(5, spec, tuple(LENGTHS + 1))
    fields = {"k": [], "v": [], "positions": [], "offsets": []}
    chosen = []
    for row, (length, first) in enumerate(zip(LENGTHS, (40, 0, 48), strict=True)):
        counts = (first, 80 - first if first == 40 else 17)
        kept = [np.sort(rng.choice(length, n, replace=False)) for n in counts]
        chosen.append(kept)
        for name, x in zip("kv", whole.row(row)[1:], strict=True):
            live = np.concatenate([x[head, at] for head, at in enumerate(kept)])
            fill = np.full((slots - len(live), spec.head_dim), np.nan)
            fields[name].append(np.concatenate([live, fill]))
        held = np.concatenate(kept)
        free = np.full(slots - len(held), EMPTY)
        fields["positions"].append(np.concatenate([held, free]))
        fields["offsets"].append(np.cumsum([0, *counts]))
    part = Ragged(
        keys=PlainArray(data=jnp.asarray(np.stack(fields["k"]), jnp.float32)),
        values=PlainArray(data=jnp.asarray(np.stack(fields["v"]), jnp.float32)),
        positions=jnp.asarray(np.stack(fields["positions"]), jnp.int32),
        offsets=jnp.asarray(np.stack(fields["offsets"]), jnp.int32),
    )
    inputs = decode_inputs(whole, LENGTHS, 0)
    ours = part.attend(inputs.q, inputs.positions, spec)
    for row, length in enumerate(LENGTHS):
        q, k, v = full_row(whole, row, length + 1)
        theirs = reference.attend_kept(q[:, -1:], k, v, chosen[row])
        close(ours.out[row], theirs)
        for head, positions in enumerate(part.live_positions()[row]):
            np.testing.assert_array_equal(positions, chosen[row][head])


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_body_and_residual(bits):
    """Whole blocks are held as the reference quantises them, the rest is exact."""
    spec, group, residual = SPECS["d32_g3"], 16, 32
    sample = draw(6, spec, tuple(LENGTHS))
    store = Storage(
        keys=Affine(bits=bits, axis="channel", group=group),
        values=Affine(bits=bits, axis="token", group=group),
        residual=residual,
    )
    cache = compressed(sample, Compression(store=store))
    body, tail = cache.parts[0], cache.tail
    assert isinstance(body, Slots)
    assert isinstance(body.keys, AffineArray) and isinstance(body.values, AffineArray)
    decoded, steps = {}, {}
    for name, array, axis in (("k", body.keys, -2), ("v", body.values, -1)):
        decoded[name] = np.asarray(array.decode(body.positions, spec.rope))
        steps[name] = np.repeat(
            np.asarray(numbers(array.scale), float), group, axis=axis
        )
    for row, length in enumerate(LENGTHS):
        whole = length // residual * residual
        _, k, v = sample.row(row)
        back = {
            "k": reference.kivi_keys(k, bits=bits, group=group, residual=residual),
            "v": reference.kivi_values(
                v, bits=bits, group=group, residual=length - whole
            ),
        }
        assert int(cache.tail.used[row]) == length - whole
        for name, plain in (("k", tail.keys), ("v", tail.values)):
            error = np.abs(decoded[name][row, :, :whole] - back[name][:, :whole])
            # Our steps are rounded to float16: near a tie the code may be the other.
            step = steps[name][row, :, :whole]
            assert (error <= 1.05 * step).all()
            assert (error <= 0.05 * step).mean() > 0.95
            held = np.asarray(plain)[row, :, : length - whole]
            np.testing.assert_allclose(held, back[name][:, whole:], rtol=1e-6)
    for head in range(spec.num_kv_heads):
        for row, length in enumerate(LENGTHS):
            parts = (body.live_positions(), tail.live_positions())
            held = np.concatenate([part[row][head] for part in parts])
            np.testing.assert_array_equal(np.sort(held), np.arange(length))
