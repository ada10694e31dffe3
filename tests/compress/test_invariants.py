"""What holds for every preset (docs/architecture.md), driven by the registry."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.codecs import LowRankArray, PlainArray
from kvjax.models import generation, inference
from kvjax.prefills import Dense
from kvjax.types import EMPTY
from tests.small import (
    BUDGETED,
    LATER,
    LENGTHS,
    PRESETS,
    REPRESENTATIVE,
    ROWS,
    VOCAB,
    batch,
    one_per_structure,
    preset,
    small_model,
    structure,
)

EVERY = pytest.mark.parametrize("name", PRESETS)
STRUCTURES = one_per_structure(6)
SOME_STRUCTURES = one_per_structure(3, 8)
TOLERANCE = 1e-4
ROOM = 64
"""Of every cache here: of one room, caches of one structure share their programs."""


@functools.lru_cache
def prefilled(name: str):
    """Logits and cache of the ragged prompts; a cache is a value, tests share it."""
    prompt, _, _ = batch()
    return kvjax.prefill(
        small_model(), prompt, LENGTHS, preset(name), max_new_tokens=ROOM
    )


@functools.lru_cache
def extended(name: str):
    """Teacher-forced logits of the continuations, through the real cache."""
    _, later, _ = batch()
    logits, cache = kvjax.extend(small_model(), prefilled(name)[1], later, LATER)
    return np.asarray(logits), cache


def rows(logits: np.ndarray) -> list[np.ndarray]:
    return [logits[row, : LATER[row]] for row in range(ROWS)]


def kept_in(cache: kvjax.KVCache, row: int) -> list[np.ndarray]:
    """Positions that a row holds, by layer and head."""
    layers = range(len(cache.layers))
    return [head for layer in layers for head in cache.kept_positions(layer)[row]]


@pytest.mark.sweep(6, 15)
@EVERY
def test_rows_do_not_see_each_other(name):
    """A row between strangers of other lengths is what it was."""
    prompt, later, _ = batch()
    rng, lengths, own = np.random.default_rng(1), LENGTHS[::-1].copy(), 1
    strange, after = (rng.integers(0, VOCAB, x.shape, "i4") for x in (prompt, later))
    strange[own], after[own], lengths[own] = prompt[own], later[own], LENGTHS[own]
    _, cache = kvjax.prefill(
        small_model(), strange, lengths, preset(name), max_new_tokens=ROOM
    )
    for ours, theirs in zip(
        kept_in(cache, own), kept_in(prefilled(name)[1], own), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    logits, _ = kvjax.extend(small_model(), cache, after, LATER)
    ours, theirs = (rows(np.asarray(x))[own] for x in (logits, extended(name)[0]))
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@STRUCTURES
def test_rows_are_what_they_are_alone(name):
    prompt, later, _ = batch()
    row = 1
    n, m = LENGTHS[row], LATER[row]
    model, c = small_model(), preset(name)
    _, alone = kvjax.prefill(model, prompt[row : row + 1, :n], None, c)
    for ours, theirs in zip(
        kept_in(prefilled(name)[1], row), kept_in(alone, 0), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    logits, _ = kvjax.extend(model, alone, later[row : row + 1, :m])
    np.testing.assert_allclose(rows(extended(name)[0])[row], logits[0], atol=TOLERANCE)


@pytest.mark.sweep(16, 99)
@EVERY
def test_two_forms_agree(name):
    _, _, whole = batch()
    total = LENGTHS + LATER
    logits = np.asarray(
        kvjax.simulate(small_model(), whole, total, LENGTHS, preset(name))
    )
    first = np.asarray(prefilled(name)[0])
    for row, real in enumerate(rows(extended(name)[0])):
        n = LENGTHS[row]
        np.testing.assert_allclose(logits[row, n - 1], first[row], atol=TOLERANCE)
        np.testing.assert_allclose(logits[row, n : total[row]], real, atol=TOLERANCE)


@pytest.mark.parametrize("name", BUDGETED)
def test_compression_changes_something(name):
    """The tolerance of the tests around this one is far below what they compare."""
    full, ours = rows(extended("none")[0]), rows(extended(name)[0])
    for one, other in zip(full, ours, strict=True):
        assert np.abs(one - other).max() > 20 * TOLERANCE


@pytest.mark.sweep(6, 8)
@pytest.mark.parametrize("name", BUDGETED)
def test_keeping_all_is_no_compression(name):
    c = preset(name).with_keep(1.0)
    if c.evict is not None and c.evict.values is not None:
        c = dataclasses.replace(
            c, evict=dataclasses.replace(c.evict, values=c.evict.budget)
        )
    prompt, later, _ = batch()
    _, cache = kvjax.prefill(small_model(), prompt, LENGTHS, c, max_new_tokens=ROOM)
    for row, n in enumerate(LENGTHS):
        for layer in range(len(cache.layers)):
            for kept in cache.kept_positions(layer)[row]:
                np.testing.assert_array_equal(kept, np.arange(n))
    if c.store != kvjax.Storage() or c.prefill.needs_retention:
        return  # they change the numbers, whatever the budget
    logits, _ = kvjax.extend(small_model(), cache, later, LATER)
    want = rows(extended("none")[0])
    for ours, full in zip(rows(np.asarray(logits)), want, strict=True):
        np.testing.assert_allclose(ours, full, atol=TOLERANCE)
        np.testing.assert_array_equal(ours.argmax(-1), full.argmax(-1))


@STRUCTURES
def test_one_token_at_a_time_is_all_at_once(name):
    _, later, _ = batch()
    _, cache = prefilled(name)
    steps = 6
    for t in range(steps):
        logits, cache = kvjax.extend(small_model(), cache, later[:, t : t + 1])
        np.testing.assert_allclose(
            logits[:, 0], extended(name)[0][:, t], atol=TOLERANCE
        )


@EVERY
def test_bytes_are_those_that_a_program_is_given(name):
    """And those of the buffers that lie on the device."""
    _, cache = prefilled(name)
    run = jax.jit(lambda cache: cache.length, keep_unused=True)
    analysis = run.lower(cache).compile().memory_analysis()
    assert analysis is not None
    assert cache.nbytes == analysis.argument_size_in_bytes
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.on_device_size_in_bytes()
        for leaf in jax.tree.leaves(cache)
        for shard in leaf.addressable_shards
    }
    assert cache.nbytes == sum(buffers.values())


@SOME_STRUCTURES
def test_bytes_are_those_of_a_step(name):
    """A decode step takes the cache as it is, and returns as much."""
    _, cache = prefilled(name)
    token = np.ones((ROWS, 1), np.int32)

    def step(cache, token):
        return kvjax.extend(small_model(), cache, token)

    run = jax.jit(step, keep_unused=True).lower(cache, token).compile()
    analysis = run.memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes == cache.nbytes + token.nbytes
    logits = ROWS * VOCAB * 4
    table = analysis.output_size_in_bytes - cache.nbytes - logits
    assert 0 <= table <= 8 * (1 + len(jax.tree.leaves(cache)))  # of pointers


@STRUCTURES
def test_free_slots_have_no_weight(name):
    """NaN in free slots changes nothing."""
    _, cache = prefilled(name)
    poisoned = poison(cache)
    token = np.ones((ROWS, 1), np.int32)
    clean, _ = kvjax.extend(small_model(), cache, token)
    dirty, _ = kvjax.extend(small_model(), poisoned, token)
    np.testing.assert_array_equal(clean, dirty)


def poison(cache: kvjax.KVCache) -> kvjax.KVCache:
    """The cache with NaN in every free slot that can hold one."""

    def ruin(part):
        free = part.positions == EMPTY
        fields = {}
        for name in ("keys", "values"):
            held = getattr(part, name, None)
            if isinstance(held, PlainArray):
                bad = jnp.where(free[..., None], jnp.nan, held.data)
                fields[name] = PlainArray(data=bad)
            elif isinstance(held, jax.Array):
                fields[name] = jnp.where(free[..., None], jnp.nan, held)
        return dataclasses.replace(part, **fields)

    groups = tuple(
        dataclasses.replace(
            group,
            parts=tuple(ruin(part) for part in group.parts),
            tail=ruin(group.tail),
        )
        for group in cache.groups
    )
    return dataclasses.replace(cache, groups=groups)


@SOME_STRUCTURES
def test_answering_twice_gives_the_same(name):
    """A cache is a value: decoding from it leaves it as it was."""
    logits, cache = prefilled(name)
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(cache)]
    first, second = (
        kvjax.generate_from(small_model(), cache, logits, max_new_tokens=ROOM)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.tokens, second.tokens)
    for old, new in zip(before, jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(old, new)


@SOME_STRUCTURES
def test_a_generation_compiles_once(name):
    """Decode-time compression included; other prompts of the bucket reuse it."""
    prompt, _, _ = batch()
    run = functools.partial(kvjax.generate, c=preset(name), max_new_tokens=ROOM)
    run(small_model(), prompt, LENGTHS)
    before = programs()
    out = run(small_model(), prompt[:, :100], np.minimum(LENGTHS, 100) - 7)
    assert (np.asarray(out.lengths) == ROOM).all()
    prefills, loops = programs()
    assert prefills == before[0]
    if not data_sized(out.cache):
        assert loops == before[1]


def programs() -> tuple[int, int]:
    """Compiled prefills and decode loops so far."""
    held: list[Any] = [inference._prefill, generation._decode_donating]
    return held[0]._cache_size(), held[1]._cache_size()


def data_sized(cache: kvjax.KVCache) -> bool:
    """Whether some part is cut to what the data needs (to a multiple, so bounded)."""
    return any(
        isinstance(held, LowRankArray)
        for layer in cache.layers
        for part in layer.parts
        for held in (getattr(part, "keys", None), getattr(part, "values", None))
    )


@EVERY
def test_the_compression_says_the_structure(name):
    """By which these tests choose for what stands for all others."""
    assert tree_of(name) == tree_of(REPRESENTATIVE[structure(name)])


def tree_of(name: str) -> list[tuple[str, Any, int]]:
    """Places, dtypes and ranks of a cache's arrays."""
    leaves, _ = jax.tree.flatten_with_path(prefilled(name)[1])
    return [(jax.tree_util.keystr(at), x.dtype, x.ndim) for at, x in leaves]


@STRUCTURES
def test_structure_never_drifts(name):
    """A step returns the tree, shapes and dtypes it was given."""
    _, cache = prefilled(name)
    _, after = kvjax.extend(small_model(), cache, np.ones((ROWS, 1), np.int32))

    def spec(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert spec(cache) == spec(after)
    assert jax.tree.structure(cache) == jax.tree.structure(after)


@SOME_STRUCTURES
def test_all_of_it_works_under_jit(name):
    prompt, later, _ = batch()
    model = small_model()
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, tokens, lengths, more):
        model = nnx.merge(graph, params)
        _, cache = kvjax.prefill(
            model, tokens, lengths, preset(name), max_new_tokens=ROOM
        )
        return kvjax.extend(model, cache, more)[0]

    logits = run(params, prompt, LENGTHS, later[:, :1])
    np.testing.assert_allclose(logits[:, 0], extended(name)[0][:, 0], atol=TOLERANCE)


@SOME_STRUCTURES
def test_bfloat16(name):
    """Runs in bf16, holds bf16, and stays near the f32 answer."""
    prompt, _, _ = batch()
    model = small_model("bfloat16")
    logits, cache = kvjax.prefill(model, prompt, LENGTHS, preset(name))
    assert all(
        leaf.dtype != jnp.float32
        for layer in cache.layers
        for leaf in jax.tree.leaves((layer.parts, layer.tail))
    )
    token = np.ones((ROWS, 1), np.int32)
    out, _ = kvjax.extend(model, cache, token)
    assert np.isfinite(np.asarray(out)).all()
    if isinstance(preset(name).prefill, Dense):  # patterns may choose differently
        np.testing.assert_allclose(logits, prefilled(name)[0], atol=0.15)
