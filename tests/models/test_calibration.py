"""Patterns by head: how they are measured, chosen, saved and used."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.depth import Depth
from kvjax.models.calibration import choice, measured
from kvjax.prefills import (
    AShape,
    BlockTopK,
    ByHead,
    Delayed,
    Dense,
    TriShape,
    VerticalSlash,
    XAttention,
)
from kvjax.prefills.chosen import own
from tests.compress.patterns import (
    SPECS,
    attend,
    peaked,
    seen_by_hand,
    weights,
)
from tests.small import LENGTHS, batch, small_model

SHARED = {"block": 16, "dense_below": 0}
CANDIDATES = (
    AShape(first=16, local=16, **SHARED),
    XAttention(threshold=0.7, stride=4, **SHARED),
    VerticalSlash(vertical=20, slash=2, last_q=8, first=1, local=1, **SHARED),
    BlockTopK(blocks=2, **SHARED),
    Dense(),
)


@pytest.mark.parametrize("spec", ["softcap"])
def test_mass_kept_is_that_of_the_weights(spec):
    """Of the queries from a twelfth of each row on, all rows and queries alike."""
    sample = peaked(11, SPECS[spec])
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    run = jax.jit(functools.partial(measured, patterns=CANDIDATES))
    _, kept, share = map(np.asarray, run(sample.inputs, lengths))
    rows, counted = range(len(sample.lengths)), 0
    wanted = np.zeros_like(kept)
    for row in rows:
        n, inputs = sample.lengths[row], own(sample.inputs)
        one = dataclasses.replace(
            inputs,
            positions=inputs.positions[row : row + 1],
            **{name: getattr(inputs, name)[row : row + 1] for name in ("q", "k", "v")},
        )
        full = weights(sample, row, np.tri(n, dtype=bool)[None])
        first = n // 12
        counted += n - first
        for place, pattern in enumerate(CANDIDATES):
            mask = np.tri(n, dtype=bool)[None]
            if not isinstance(pattern, Dense):
                size = lengths[row : row + 1]
                mask = seen_by_hand(pattern, one, size)[:, :n, :n]
            wanted[place] += (full * mask)[:, first:].sum(axis=(1, 2))
    np.testing.assert_allclose(kept, wanted / counted, rtol=1e-4, atol=1e-5)
    assert (kept[:-1] < 0.999).all() and (kept[-1] == 1).all()
    assert (share[:-1] < 0.9).all() and (share[-1] == 1).all()


def test_choice():
    retained = np.array([[0.5, 0.9, 0.9, 0.99], [0.2, 0.3, 0.1, 0.3]])
    share = np.array([[0.1, 0.4, 0.3, 0.8], [0.1, 0.5, 0.1, 0.2]])
    np.testing.assert_array_equal(choice(retained, share, None), [3, 3])
    np.testing.assert_array_equal(choice(retained, share, 0.85), [2, 3])
    np.testing.assert_array_equal(choice(retained, share, 0.2), [0, 0])


def test_each_head_has_its_own_pattern():
    """In each layer, of which the number is traced; one call computes all."""
    sample, some = peaked(12, SPECS["full"]), CANDIDATES[1:3] + CANDIDATES[-1:]
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    table = ((0, 1, 2, 1), (2, 2, 0, 1))
    by_head = ByHead(patterns=some, table=table, block=16, dense_below=0)
    alone = [np.asarray(attend(p, sample.inputs, lengths)[0]) for p in some]

    @jax.jit
    def run(layer):
        inputs = dataclasses.replace(sample.inputs, depth=Depth(layer=layer))
        return by_head.attend(inputs, lengths, False)[0]

    for layer, row in enumerate(table):
        out = np.asarray(run(jnp.asarray(layer)))
        for head, place in enumerate(row):
            for at, n in enumerate(sample.lengths):
                ours, want = (x[at, head, :n] for x in (out, alone[place]))
                np.testing.assert_allclose(ours, want, rtol=2e-5, atol=2e-5)


@functools.lru_cache
def calibrated(retain: float | None = None):
    prompt, _, _ = batch()
    patterns = tuple(
        one if isinstance(one, Dense) else dataclasses.replace(one, dense_below=8)
        for one in CANDIDATES[:3]
    )
    return kvjax.calibrate(
        small_model(),
        prompt,
        LENGTHS,
        candidates=patterns,
        retain=retain,
        name="small",
    )


def test_a_table_is_saved_and_read(tmp_path):
    found, path = calibrated(), tmp_path / "table.yaml"
    assert found.retained.shape == found.share.shape == (2, 4, 3)
    np.testing.assert_array_equal(found.table, found.retained.argmax(-1))
    assert len(np.unique(found.retained)) > 12  # heads differ
    found.save(path)
    c = kvjax.compression(path)
    assert c == found.compression
    assert isinstance(hash(c), int)
    assert "small (weights " in path.read_text().partition("prefill:")[0]
    prompt, _, _ = batch()
    changed = kvjax.compression(path, **{"prefill.dense_below": 0})
    logits, _ = kvjax.prefill(small_model(), prompt, LENGTHS, changed)
    dense, _ = kvjax.prefill(small_model(), prompt, LENGTHS)
    assert np.abs(logits - dense).max() > 1e-3
    same, _ = kvjax.prefill(small_model(), prompt, LENGTHS, c)
    np.testing.assert_allclose(same, dense, atol=1e-5)  # below 8192 tokens


def test_the_least_work_that_keeps_enough():
    best, cheap = calibrated(), calibrated(0.5)
    assert cheap.chosen(cheap.share).mean() < best.chosen(best.share).mean()
    enough = best.retained.max(-1) >= 0.5
    assert (cheap.chosen(cheap.retained)[enough] >= 0.5).all()


def test_tables_of_other_models_are_refused():
    c, prompt = calibrated().compression, batch()[0]
    deeper = small_model(layers=3)
    message = r"2 layers with 4 query heads \(measured on small .*this model has 3 with"
    with pytest.raises(ValueError, match=message):
        kvjax.prefill(deeper, prompt, LENGTHS, c)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"table": ((0, 1), (1,))}, r"as many heads each; got 2 layers with \[1, 2\]"),
        ({"table": ()}, "as many heads each; got 0 layers"),
        ({"table": ((0, 7),)}, r"`table.0` must name `patterns` by 0 .. 1; got \[0, 7"),
        ({"block": 64}, r"`patterns.0` \(AShape\) must have the `block` of all, 64"),
        ({"patterns": (Delayed(),)}, "`patterns.0` must be a sparse pattern"),
    ],
)
def test_bad_tables(fields, message):
    given: dict[str, Any] = {"patterns": (AShape(), TriShape()), "table": ((0, 1),)}
    with pytest.raises(ValueError, match=message):
        ByHead(**given | fields)


def test_bad_calls(tmp_path):
    prompt, _, _ = batch()
    call = functools.partial(kvjax.calibrate, small_model(), prompt, LENGTHS)
    with pytest.raises(ValueError, match="`candidates` must name a pattern"):
        call(candidates=())
    with pytest.raises(ValueError, match="must be a sparse pattern of blocks"):
        call(candidates=(Delayed(),))
    with pytest.raises(ValueError, match="`retain` must be a number in"):
        call(retain=1.5)
    with pytest.raises(ValueError, match=r"file ends in \.yaml; got"):
        calibrated().save(tmp_path / "table.json")
