"""Bodies in the host's memory (`store.place.body: host`): where they lie, and say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Pages, Places
from kvjax.codecs import AbstractEncoded, OnHost
from kvjax.compress.config import Compression
from kvjax.memory import check_host, on_host
from kvjax.schedules import EveryChunk
from tests.small import (
    LATER,
    LENGTHS,
    PRESETS,
    batch,
    preset,
    small_model,
)

MOVABLE = tuple(n for n in PRESETS if preset(n).schedule.interval is None)
EVERY = pytest.mark.parametrize("name", MOVABLE)


def on_the_host(c: Compression) -> Compression:
    store = dataclasses.replace(c.store, place=Places(body="host"))
    ranges = tuple(
        dataclasses.replace(
            some,
            store=None
            if some.store is None
            else dataclasses.replace(some.store, place=Places(body="host")),
        )
        for some in c.layers
    )
    return dataclasses.replace(c, store=store, layers=ranges)


def assert_placed(cache: kvjax.KVCache) -> None:
    """Keys and values of bodies are where they belong, by what the arrays say."""
    found = False
    for group in cache.groups:
        for part in group.parts:
            for field in dataclasses.fields(part):  # type: ignore[arg-type]
                held = getattr(part, field.name)
                if isinstance(held, AbstractEncoded):
                    assert isinstance(held, OnHost)
                    found = True
                    for leaf in jax.tree.leaves(held):
                        assert leaf.sharding.memory_kind == "pinned_host"
                elif isinstance(held, jax.Array):
                    assert held.sharding.memory_kind == "device"
        for leaf in jax.tree.leaves(group.tail):
            assert leaf.sharding.memory_kind == "device"
    assert found


@pytest.mark.sweep(3, 12)
@EVERY
def test_it_says_the_same_from_the_host(name):
    prompt, later, _ = batch()
    model, c = small_model(), preset(name)
    there = on_the_host(c)
    logits, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=64)
    same, moved = kvjax.prefill(model, prompt, LENGTHS, there, max_new_tokens=64)
    assert_placed(moved)
    assert moved.nbytes == cache.nbytes and cache.host_nbytes == 0
    assert 0 < moved.host_nbytes < moved.nbytes
    np.testing.assert_allclose(same, logits, atol=1e-5)
    wanted, _ = kvjax.extend(model, cache, later, LATER)
    found, after = kvjax.extend(model, moved, later, LATER)
    assert_placed(after)
    for row, n in enumerate(LATER):
        np.testing.assert_allclose(found[row, :n], wanted[row, :n], atol=1e-4)


@pytest.mark.parametrize("name", ["none", "kivi_4bit", "quest"])
def test_decoding_leaves_it_there(name):
    prompt, _, _ = batch()
    model, c = small_model(), preset(name)
    logits, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=40)
    wanted = kvjax.generate_from(model, cache, logits, max_new_tokens=36)
    found = kvjax.generate_from(model, cache.placed("host"), logits, max_new_tokens=36)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert_placed(found.cache)
    back = found.cache.placed("device")
    assert back.host_nbytes == 0 and back.nbytes == found.cache.nbytes
    ours, theirs = map(jax.tree.leaves, (back, wanted.cache))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "quest"])
def test_a_prompt_in_chunks_goes_there_chunk_by_chunk(name):
    prompt, later, _ = batch()
    model, schedule = small_model(), EveryChunk(size=32)
    c = dataclasses.replace(on_the_host(preset(name)), schedule=schedule)
    _, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=64)
    assert_placed(cache)
    _, whole = kvjax.prefill(model, prompt, LENGTHS, preset(name), max_new_tokens=64)
    wanted, _ = kvjax.extend(model, whole, later, LATER)
    found, _ = kvjax.extend(model, cache, later, LATER)
    for row, n in enumerate(LATER):
        np.testing.assert_allclose(found[row, :n], wanted[row, :n], atol=1e-4)


def test_it_works_under_jit():
    prompt, later, _ = batch()
    model, c = small_model(), on_the_host(preset("quest"))

    @jax.jit
    def run(prompt, lengths):
        _, cache = kvjax.prefill(model, prompt, lengths, c, max_new_tokens=64)
        body = cache.groups[-1].parts[0]
        assert isinstance(body, Pages)
        assert all(on_host(x) for x in jax.tree.leaves(body.keys))
        return kvjax.extend(model, cache, later)[0]

    _, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=64)
    wanted, _ = kvjax.extend(model, cache, later)
    found = run(jnp.asarray(prompt), jnp.asarray(LENGTHS))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_files_stores_and_forks_know_where_it_lies(tmp_path):
    prompt, later, _ = batch()
    model, c = small_model(), on_the_host(preset("none"))
    _, cache = kvjax.prefill(model, prompt[:1], None, c)
    cache.save(tmp_path / "cache")
    loaded = kvjax.load_cache(tmp_path / "cache", model)
    assert_placed(loaded)
    wanted, _ = kvjax.extend(model, cache, later[:1])
    found, _ = kvjax.extend(model, loaded, later[:1])
    np.testing.assert_array_equal(found, wanted)
    rows = cache.fork(2, max_new_tokens=64)
    assert rows.host_nbytes == cache.host_nbytes
    found, _ = kvjax.extend(model, rows, np.tile(later[:1], (2, 1)))
    np.testing.assert_allclose(found[1], wanted[0], atol=1e-4)
    store = kvjax.PrefixStore(bytes=2 * cache.nbytes, host_bytes=2**30)
    store.put(prompt[0], cache)
    for other in prompt[1:]:  # the first moves up and down
        store.put(other, kvjax.prefill(model, other[None], None, c)[1])
    request = np.concatenate([prompt[0], later[0]])
    assert (hit := store.longest(model, request, c)) is not None
    assert_placed(hit.cache)


def test_what_is_written_to_at_every_step_stays():
    with pytest.raises(ValueError, match="lies on the device; got store.place.body"):
        kvjax.compression("h2o_decode", **{"store.place.body": "host"})
    prompt, _, _ = batch()
    _, cache = kvjax.prefill(small_model(), prompt, LENGTHS, preset("h2o_decode"))
    with pytest.raises(ValueError, match="without schedule.interval"):
        cache.placed("host")
    with pytest.raises(ValueError, match="body"):
        cache.placed("disk")


def test_a_device_without_such_memory_says_which_it_has():
    class Device:
        device_kind = "toy"

        def addressable_memories(self):
            return [type("Memory", (), {"kind": "device"})]

    with pytest.raises(ValueError, match=r"toy .* no 'pinned_host', only \['device'\]"):
        check_host(Device())  # type: ignore[arg-type]
