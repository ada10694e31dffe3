"""Rows that go on from one: what it holds is held once, and each goes its own way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import LayerCache
from tests.small import (
    LATER,
    LENGTHS,
    PRESETS,
    ROWS,
    VOCAB,
    batch,
    one_per_structure,
    preset,
    small_model,
)
from tests.typecheck import wrong_types

ROW, NEW = 1, 30
"""Which prompt is forked, and the tokens that each row adds."""


def forked(name: str) -> tuple[kvjax.KVCache, kvjax.KVCache]:
    """A cache of one prompt, and three rows that go on from it."""
    prompt, _, _ = batch()
    tokens = prompt[ROW : ROW + 1, : LENGTHS[ROW]]
    how = (small_model(), tokens, None, preset(name))
    _, cache = kvjax.prefill(*how, max_new_tokens=NEW)
    return cache, cache.fork(ROWS, max_new_tokens=NEW)


def pointers(parts) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(parts)]


@one_per_structure(3, 9)
def test_rows_go_on_as_the_cache_itself_would(name):
    """Each by its own tokens, in one call and in two, and the cache stays as it was."""
    _, later, _ = batch()
    (cache, rows), counts = forked(name), np.minimum(LATER, NEW)
    counts[0] = 7
    before = [np.asarray(x) for x in jax.tree.leaves(cache)]
    got, after = kvjax.extend(small_model(), rows, later[:, :NEW], counts)
    _, half = kvjax.extend(small_model(), rows, later[:, :7])
    rest, end = kvjax.extend(small_model(), half, later[:, 7:NEW], counts - 7)
    for row, n in enumerate(counts):
        tokens = later[row : row + 1, :n]
        wanted, alone = kvjax.extend(small_model(), cache, tokens)
        if not preset(name).read.block:  # pages are chosen apart
            np.testing.assert_allclose(got[row, :n], wanted[0], atol=1e-4)
            np.testing.assert_allclose(rest[row, : n - 7], wanted[0, 7:], atol=1e-4)
        for one in (after, end):
            assert int(one.length[row]) == int(alone.length[0])
            for layer in range(2):
                heads = zip(
                    one.kept_positions(layer)[row],
                    alone.kept_positions(layer)[0],
                    strict=True,
                )
                for ours, theirs in heads:
                    np.testing.assert_array_equal(ours, theirs)
            assert one.digest is not None and alone.digest is not None
            np.testing.assert_array_equal(one.digest[row], alone.digest[0])
    for old, now in zip(before, jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(old, now)


@one_per_structure(3, 9)
def test_what_is_held_is_held_once(name):
    cache, rows = forked(name)
    _, after = kvjax.extend(small_model(), rows, np.ones((ROWS, 3), np.int32))
    more = cache.fork(2 * ROWS, max_new_tokens=NEW)
    for group, given, later, many in zip(
        rows.groups, cache.groups, after.groups, more.groups, strict=True
    ):
        if given.folding is not None:  # evicts on, every row from its own
            assert not group.front
            continue
        for one in (group, later, many):
            assert pointers(one.front) == pointers(given.parts), "the very buffers"
    own = rows.nbytes - sum(held_by(group) for group in rows.groups)
    assert more.nbytes - rows.nbytes == own


def held_by(group: LayerCache) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(group.front))


def test_tokens_that_were_added_are_shared_too():
    """Of a cache that has grown, and of a fork of one row."""
    _, later, _ = batch()
    cache, _ = forked("none")
    _, cache = kvjax.extend(small_model(), cache, later[:1, :9])
    again = cache.fork(1).fork(2, max_new_tokens=4)
    got, _ = kvjax.extend(small_model(), again, later[:2, 9:13])
    for row in range(2):
        tokens = later[row : row + 1, 9:13]
        wanted, _ = kvjax.extend(small_model(), cache, tokens)
        np.testing.assert_allclose(got[row], wanted[0], atol=1e-5)


def test_generation_from_a_fork():
    """Row by row what the cache generates, and the fork can be used again."""
    cache, rows = forked("kivi_2bit")
    draw = np.random.default_rng(2)
    logits = jnp.asarray(draw.standard_normal((ROWS, VOCAB)), jnp.float32)
    twice = [
        kvjax.generate_from(small_model(), rows, logits, max_new_tokens=9)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(twice[0].tokens, twice[1].tokens)
    for row in range(ROWS):
        mine = logits[row : row + 1]
        alone = kvjax.generate_from(small_model(), cache, mine, max_new_tokens=9)
        np.testing.assert_array_equal(twice[0].tokens[row], alone.tokens[0])


def test_under_jit():
    cache, _ = forked("none")
    tokens = np.ones((2, 3), np.int32)

    @jax.jit
    def run(cache):
        return kvjax.extend(small_model(), cache.fork(2, max_new_tokens=4), tokens)[0]

    wanted, _ = kvjax.extend(small_model(), cache.fork(2), tokens)
    np.testing.assert_allclose(run(cache), wanted, atol=1e-5)


@wrong_types
def test_what_cannot_be_forked():
    cache, rows = forked("none")
    with pytest.raises(ValueError, match="a cache of 3"):
        rows.fork(2)
    wrongs: list[Any] = [0, -1, 1.5, "2", 2**31]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="`?rows`?"):
            cache.fork(wrong)
        if wrong != 0:
            with pytest.raises(ValueError, match="max_new_tokens"):
                cache.fork(2, max_new_tokens=wrong)

    @jax.jit
    def overfull(cache):
        return kvjax.extend(small_model(), cache, np.ones((1, NEW + 9), np.int32))[1]

    with pytest.raises(ValueError, match="9 tokens more than it holds"):
        overfull(cache).fork(2)
    with pytest.raises(ValueError, match="room for 4"):
        kvjax.extend(
            small_model(), cache.fork(2, max_new_tokens=4), np.ones((2, 5), np.int32)
        )


@pytest.mark.sweep(0, 3)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_forks(name):
    _, rows = forked(name)
    logits, _ = kvjax.extend(small_model(), rows, np.ones((ROWS, 5), np.int32))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits[0], logits[1])
