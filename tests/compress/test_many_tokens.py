"""Many tokens at once into caches that change as they go: as one after the other."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import kvjax
from kvjax.schedules import EveryTokens
from tests.small import LENGTHS, PRESETS, ROWS, VOCAB, batch, preset, small_model

CHANGING = {
    name: preset(name)
    for name in PRESETS
    if preset(name).schedule.interval is not None
    or any(plan.block for plan in preset(name).parts)
}
"""Compressions under which later tokens move into a body."""
CHANGING |= {
    f"{name}, {interval} at once": dataclasses.replace(
        preset(name), schedule=EveryTokens(interval=interval)
    )
    for name in PRESETS
    if preset(name).schedule.interval is not None
    for interval in (1, 7)
}
FAST = ("kivi_2bit", "h2o_decode", "h2o_decode, 7 at once")
EVERY = pytest.mark.parametrize(
    "name",
    [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in CHANGING],
)

BEFORE = np.array([0, 3, 6], np.int32)
"""Tokens that are there already: every row's tail is filled to another level."""
AFTER = np.array([45, 38, 41], np.int32)


def test_all_kinds_of_change_are_here():
    asked = {"kivi_2bit", "kivi_4bit", "quest", "h2o_decode", "snapkv_decode"}
    assert asked <= CHANGING.keys()


@functools.lru_cache
def later() -> np.ndarray:
    tokens = np.random.default_rng(7).integers(0, VOCAB, (ROWS, 64))
    return tokens.astype(np.int32)


def run(cache: kvjax.KVCache, chunk: int, turns: bool = False):
    """Logits of each row and the cache, `chunk` tokens of a row at a time.

    With `turns` rows are given none of each second chunk in turn.
    """
    model = small_model()
    done, logits = np.zeros(ROWS, np.int32), [[] for _ in range(ROWS)]
    pieces = 0
    while (done < AFTER).any():
        count = np.minimum(AFTER - done, chunk)
        if turns:
            waits = np.arange(ROWS) % 2 == pieces % 2
            count = np.where(waits, 0, count)
        index = np.minimum(done[:, None] + np.arange(chunk), 63)
        tokens = np.take_along_axis(later(), index, axis=1)
        out, cache = kvjax.extend(model, cache, tokens, count.astype(np.int32))
        for row in range(ROWS):
            logits[row].append(np.asarray(out[row, : count[row]]))
        done, pieces = done + count, pieces + 1
    return [np.concatenate(row) for row in logits], cache


@functools.lru_cache
def start(name: str):
    """A cache whose tails hold more in one row than in another."""
    prompt, _, _ = batch()
    _, cache = kvjax.prefill(
        small_model(), prompt, LENGTHS, CHANGING[name], max_new_tokens=64
    )
    tokens = np.random.default_rng(8).integers(0, VOCAB, (ROWS, 6)).astype(np.int32)
    _, cache = kvjax.extend(small_model(), cache, tokens, BEFORE)
    return cache


@functools.lru_cache
def one_by_one(name: str):
    return run(start(name), 1)


@pytest.mark.sweep(1, 4)
@EVERY
@pytest.mark.parametrize(
    ("chunk", "turns"),
    [(45, False), (3, False), (5, True), (33, True), (17, False)],
)
def test_many_are_one_after_the_other(name, chunk, turns):
    begin = start(name)
    tails = [layer.tail for layer in begin.layers if layer.tail.capacity > 1]
    assert not tails or any(len(set(tail.used.tolist())) > 1 for tail in tails)
    logits, cache = run(begin, chunk, turns)
    wanted, other = one_by_one(name)
    for ours, theirs in zip(logits, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_array_equal(cache.length, other.length)
    assert jax.tree.structure(cache) == jax.tree.structure(other)
    for layer in range(len(cache.layers)):
        pairs = zip(
            cache.kept_positions(layer), other.kept_positions(layer), strict=True
        )
        for ours, theirs in pairs:
            for one, two in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(one, two)
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        np.testing.assert_array_equal(ours.tail.used, theirs.tail.used)


@pytest.mark.sweep(1, 3)
@EVERY
def test_rows_without_new_tokens_stay(name):
    """What a row holds does not change where only others are given tokens."""
    cache = start(name)
    count = np.array([0, 45, 0], np.int32)
    _, after = kvjax.extend(small_model(), cache, later()[:, :45], count)
    np.testing.assert_array_equal(after.length, cache.length + count)
    for ours, theirs in zip(after.layers, cache.layers, strict=True):
        for one, two in zip(
            jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
        ):
            np.testing.assert_array_equal(one[::2], two[::2])
