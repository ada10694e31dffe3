"""What dropped tokens leave in kept ones, against the reference merges."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.budgets import AdaKV
from kvjax.cache import AbstractMerge, Slots, present
from kvjax.codecs import Affine
from kvjax.compress.config import Storage
from kvjax.compress.layer import build
from kvjax.compress.observe import observe
from kvjax.compress.survey import survey
from kvjax.depth import Depth
from kvjax.merges import D2O, MERGES
from kvjax.merges import _d2o as d2o_module
from kvjax.prefills import Dense
from kvjax.types import EMPTY, Held
from kvjax.units import Chunk
from tests import reference
from tests.compress.merges import CASES, SPEC, by_head, compression, row_of, with_nan
from tests.compress.samples import Sample, compressed, draw, layer_spec
from tests.small import LENGTHS, batch, preset, small_model

EVERY = pytest.mark.parametrize("name", CASES)


def test_every_merge_has_a_reference():
    assert {name: type(merge) for name, (merge, _) in CASES.items()} == MERGES


def drawn(in_order: bool, dtype: str = "float32", **fields) -> tuple[Held, np.ndarray]:
    """Three rows, NaN in free slots, and scores of their tokens; some are 0."""
    rng, shape = np.random.default_rng(0), (3, 2, 50)
    positions = np.full(shape, EMPTY, np.int32)
    for row, n in enumerate((50, 37, 12)):
        for head in range(shape[1]):
            if in_order:
                positions[row, head, :n] = np.arange(n)
            else:
                at, place = rng.permutation(50)[:n], rng.permutation(150)[:n]
                positions[row, head, at] = place
    free = positions == EMPTY
    k, v = rng.normal(size=(2, *shape, 16))
    k, v = (jnp.asarray(np.where(free[..., None], np.nan, x), dtype) for x in (k, v))
    scores = rng.gamma(0.5, size=shape).astype(np.float32)
    scores[..., ::7] = 0
    held = Held(
        k=k,
        v=v,
        positions=jnp.asarray(positions),
        seen=jnp.max(jnp.asarray(positions), axis=(1, 2)) + 1,
        spec=layer_spec(4, 2, 16, **fields),
        in_order=in_order,
    )
    return held, np.where(free, np.nan, scores)


def merge_rows(merge: AbstractMerge, held: Held, kept, scores):
    """Keys and values as the library merges them."""
    return jax.jit(merge.merged)(present(held), jnp.asarray(kept), jnp.asarray(scores))


def close_rows(ours, name: str, held: Held, kept, scores, **tolerance) -> None:
    """`ours` of kept tokens are the reference's, which something changed."""
    k, v, at = (np.asarray(x, float) for x in (held.k, held.v, held.positions))
    k, v, scores = (np.nan_to_num(x) for x in (k, v, scores))
    changed = []
    for row in range(len(k)):
        given = (k[row], v[row], scores[row], kept[row], at[row].astype(int))
        theirs = CASES[name][1](*given, held.spec)
        for mine, other in zip(ours, theirs, strict=True):
            mine = np.asarray(mine, float)[row]
            np.testing.assert_allclose(mine[kept[row]], other[kept[row]], **tolerance)
        changed.append(np.abs(theirs[1] - v[row])[kept[row]].max(initial=0))
    assert max(changed) > 0.1


@EVERY
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_in_any_order(name, in_order, dtype, tolerance):
    held, scores = drawn(in_order, dtype)
    kept = np.random.default_rng(1).random(scores.shape) < 0.4
    kept &= np.asarray(held.live)
    ours = merge_rows(CASES[name][0], held, kept, scores)
    assert all(x.dtype == held.k.dtype for x in ours)
    close_rows(ours, name, held, kept, scores, **tolerance(dtype))


@EVERY
def test_what_gets_nothing_keeps_every_bit(name):
    """Nothing is dropped, or everything is; a head of its own for each row."""
    held, scores = drawn(False)
    kept = np.asarray(held.live).copy()
    last = np.argmax(np.where(kept, held.positions, EMPTY), axis=-1)
    kept[1] = False
    kept[2, 1, last[2, 1]] = False
    ours = merge_rows(CASES[name][0], held, kept, scores)
    for mine, old in zip(ours, (held.k, held.v), strict=True):
        for at in [(0, 0), (0, 1), (2, 0)]:
            np.testing.assert_array_equal(mine[at][kept[at]], old[at][kept[at]])
        assert np.isfinite(mine).all()


@EVERY
def test_free_slots_are_in_no_gradient(name):
    held, scores = drawn(False)
    kept = np.random.default_rng(1).random(scores.shape) < 0.4
    kept = jnp.asarray(kept & np.asarray(held.live))

    def total(k, v, scores):
        given = present(dataclasses.replace(held, k=k, v=v))
        pair = CASES[name][0].merged(given, kept, scores)
        return sum(jnp.sum(jnp.where(kept[..., None], x, 0) ** 2) for x in pair)

    slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    found = slopes(held.k, held.v, jnp.asarray(scores))
    assert all(np.isfinite(np.asarray(x)).all() for x in found)
    dropped = np.asarray(held.live & ~kept)
    assert np.asarray(found[1])[dropped].any()


@EVERY
def test_what_left_the_window_is_absent(name):
    held, scores = drawn(False, window=60)
    inside = held.positions > held.seen[:, None, None] - 1 - 60
    kept = np.random.default_rng(2).random(scores.shape) < 0.5
    kept &= np.asarray(inside & held.live)
    assert not np.asarray(inside | ~held.live).all()
    ours = merge_rows(CASES[name][0], held, kept, scores)
    alone = dataclasses.replace(
        held, positions=jnp.where(inside, held.positions, EMPTY)
    )
    close_rows(ours, name, alone, kept, scores, rtol=1e-5, atol=1e-5)


def test_similarities_in_pieces(monkeypatch):
    held, scores = drawn(False)
    kept = np.asarray(held.live) & (np.arange(50) % 3 == 0)
    whole = merge_rows(D2O(), held, kept, scores)
    monkeypatch.setattr(d2o_module, "CHUNK", 7)
    jax.clear_caches()
    for ours, theirs in zip(merge_rows(D2O(), held, kept, scores), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def check_prompt(part, sample: Sample, name: str, before: int = 0, steps: float = 0):
    """What is held of a prompt is merged as the reference says.

    Up to `steps` of eight bits of the range of what is held.
    """
    spec, changed = sample.inputs.spec, []
    for row, n in enumerate(sample.lengths):
        q, k, v = row_of(sample, row, n)
        received = reference.score_h2o(q, k, v)
        held = [by_head(part, row, head) for head in range(spec.num_kv_heads)]
        kept = np.zeros(received.shape, bool)
        for head, (positions, _, _) in enumerate(held):
            kept[head, positions - before] = True
        assert not kept.all()
        positions = np.broadcast_to(np.arange(n) + before, kept.shape)
        theirs = CASES[name][1](k, v, received, kept, positions, spec)
        for head, (_, *ours) in enumerate(held):
            for mine, other in zip(ours, theirs, strict=True):
                want = other[head][kept[head]]
                far = {"rtol": 1e-5, "atol": 1e-5 + steps * np.ptp(want) / 255}
                np.testing.assert_allclose(mine, want, **far)
        changed.append(np.abs(theirs[1] - v)[kept].max())
    assert min(changed) > 0.1


LAYOUTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "heads": {"budget": AdaKV(keep=0.4)},
    "chunks": {"unit": Chunk(size=5)},
    "reused": {"unit": Chunk(size=5, reuse=2)},
}


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_prompt(name, layout):
    sample = with_nan(draw(3, SPEC, (75, 40, 61), width=80))
    cache = compressed(sample, compression(name, **LAYOUTS[layout]))
    check_prompt(cache.parts[0], sample, name)


@EVERY
@pytest.mark.parametrize("layout", ["tokens", "heads"])
def test_quantised_behind_a_merge(name, layout):
    """Half a step, and what float16 takes of it."""
    sample = with_nan(draw(3, SPEC, (75, 40, 61), width=80))
    eight = Affine(bits=8, group=16)
    c = compression(name, store=Storage(keys=eight, values=eight), **LAYOUTS[layout])
    cache = compressed(sample, c)
    check_prompt(cache.parts[0], sample, name, steps=0.51)


@EVERY
def test_behind_a_prefix(name):
    """Keys stand at later positions than their places in the row."""
    sample = with_nan(draw(3, SPEC, (75, 40, 61), width=80))
    c, before = compression(name), 19
    given, lengths = sample.inputs, jnp.asarray(sample.lengths, jnp.int32)
    _, mass = Dense().attend(given, lengths, True)
    specs = (given.spec,) * given.spec.num_layers
    found = survey(c, specs, lengths, 80, given.k.dtype)
    seen = observe(given, lengths + before, found.layouts[0].plan, mass)
    how = (seen, lengths, found.layouts[0], found.of(Depth()))
    cache, _ = build(*how, room=16, before=before)
    check_prompt(cache.parts[0], sample, name, before)


def test_behind_a_real_prefix(tolerance):
    """What a model holds of rows behind a shared prefix, of every layer."""
    prompt, later, _ = batch()
    model, c, shared = small_model(), preset("d2o"), 21
    _, front = kvjax.prefill(model, prompt[:1, :shared])
    lengths = LENGTHS - shared
    given = (model, prompt[:, shared:], lengths)
    _, all_ = kvjax.prefill(*given, c.with_keep(1.0), prefix=front)
    _, some = kvjax.prefill(*given, c, prefix=front)
    for mine, other in zip(some.layers, all_.layers, strict=True):
        spec, ours = mine.spec, next(p for p in mine.parts if type(p) is Slots)
        every = next(p for p in other.parts if type(p) is Slots)
        for row, n in enumerate(lengths):
            pairs = [by_head(every, row, head) for head in range(spec.num_kv_heads)]
            at, k, v = (np.stack(x).astype(float) for x in zip(*pairs, strict=True))
            np.testing.assert_array_equal(at[0], np.arange(n) + shared)
            held = [by_head(ours, row, head) for head in range(spec.num_kv_heads)]
            kept = np.stack([np.isin(a, h[0]) for a, h in zip(at, held, strict=True)])
            theirs = CASES["d2o"][1](k, v, None, kept, at.astype(int), spec)
            for head, (_, *arrays) in enumerate(held):
                for mine_, other_ in zip(arrays, theirs, strict=True):
                    want = other_[head][kept[head]]
                    np.testing.assert_allclose(mine_, want, **tolerance("float32"))
    logits, _ = kvjax.extend(model, some, later)
    assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("cam", {"evict.merge.receivers": 0}, "receivers` must be an integer"),
        ("cam", {"evict.merge.type": "cam2"}, "Did you mean 'cam'"),
        ("decoupled", {"evict.merge": "d2o"}, "exclude each other; got D2O"),
    ],
)
def test_bad_input(name, overrides, says):
    with pytest.raises(ValueError, match=says):
        kvjax.compression(name, **overrides)
