"""The store of prefixes: never a wrong hit, always the longest, within its bounds."""

import functools
import gc
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from tests.small import VOCAB, preset, small_model
from tests.typecheck import wrong_types

TEXT = np.random.default_rng(5).integers(0, VOCAB, 40).astype(np.int32)


@functools.lru_cache
def cache_of(tokens: tuple[int, ...], name: str = "none", std: float = 0.08):
    model = small_model(std=std)
    return kvjax.prefill(model, np.array([tokens], np.int32), None, preset(name))[1]


SIZE = cache_of((1, 2, 3)).closed().nbytes


@functools.lru_cache
def entries() -> list[tuple[tuple[int, ...], str, float]]:
    """Beginnings of few texts, many of them beginnings of each other."""
    draw = random.Random(3)
    found = []
    for _ in range(24):
        tokens = tuple(draw.choices((0, 1), k=draw.randint(1, 5)))
        found.append((tokens, draw.choice(["none", "int8"]), draw.choice([0.08, 0.09])))
    return found


class Oracle:
    """What a store must find: all that was put into it, one by one."""

    def __init__(self):
        self.held: dict = {}

    def longest(self, tokens, name, std):
        found = [
            (len(known), known)
            for known, method, scale in self.held
            if (method, scale) == (name, std)
            and len(known) < len(tokens)
            and tokens[: len(known)] == known
        ]
        return max(found)[1] if found else None


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_a_slow_search_finds(seed, tmp_path):
    """With room for all of them somewhere, whatever moves down and up again."""
    draw, oracle = random.Random(seed), Oracle()
    how = {"bytes": 3 * SIZE, "host_bytes": 3 * SIZE, "directory": tmp_path}
    store = kvjax.PrefixStore(**how)
    for step in range(60):
        tokens, name, std = draw.choice(entries())
        if draw.random() < 0.4:
            store.put(np.array(tokens), cache_of(tokens, name, std))
            oracle.held[tokens, name, std] = True
        else:
            asked = tuple(draw.choices((0, 1), k=draw.randint(1, 7)))
            c = preset(name)
            found = store.longest(small_model(std=std), np.array(asked), c)
            wanted = oracle.longest(asked, name, std)
            assert (found and tuple(found.tokens)) == wanted
            if found is not None:
                same_numbers(found.cache, cache_of(wanted, name, std).closed())
        assert store.nbytes <= 3 * SIZE and store.host_nbytes <= 3 * SIZE
        assert len(store) == len(oracle.held)
        if step == 40:  # what is on the disk outlives the store
            del store
            store = kvjax.PrefixStore(**how)
            kept = {key: True for key in oracle.held if on_disk(store, *key)}
            assert len(kept) == len(store)
            oracle.held = kept


def on_disk(store, tokens, name, std) -> bool:
    longer = np.array([*tokens, 0])
    found = store.longest(small_model(std=std), longer, preset(name))
    return found is not None and tuple(found.tokens) == tokens


def same_numbers(one, other) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_request_reads_the_rest_alone():
    model = small_model()
    store = kvjax.PrefixStore(bytes=2**20)
    _, held = kvjax.prefill(model, TEXT[None, :30])
    store.put(TEXT[:30], held)
    found = store.longest(model, TEXT)
    assert found is not None
    rest = TEXT[None, len(found.tokens) :]
    logits, cache = kvjax.prefill(model, rest, prefix=found.cache)
    np.testing.assert_allclose(logits, kvjax.prefill(model, TEXT[None])[0], atol=1e-5)
    store.put(TEXT, cache)  # a prefix of a prefix, whose body is there already
    assert store.nbytes < 1.6 * held.closed().nbytes
    for asked, known in ((TEXT, 30), (np.append(TEXT, 1), len(TEXT))):
        found = store.longest(model, asked)
        assert found is not None and len(found.tokens) == known


@pytest.mark.parametrize("name", ["none", "kivi_2bit", "h2o_decode"])
def test_what_is_found_can_be_forked(name):
    """As the cache that was put in."""
    model, c, later = small_model(), preset(name), np.ones((2, 20), np.int32)
    store = kvjax.PrefixStore(bytes=2**20)
    _, cache = kvjax.prefill(model, TEXT[None], None, c, max_new_tokens=30)
    store.put(TEXT, cache)
    found = store.longest(model, np.append(TEXT, 1), c)
    assert found is not None
    ours, _ = kvjax.extend(model, found.cache.fork(2), later)
    theirs, _ = kvjax.extend(model, cache.fork(2), later)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_what_was_not_used_for_longest_is_gone():
    store, model = kvjax.PrefixStore(bytes=2 * SIZE), small_model()
    for tokens in ((1,), (2,)):
        store.put(np.array(tokens), cache_of(tokens))
    assert store.longest(model, [1, 5]) is not None
    store.put(np.array((3,)), cache_of((3,)))
    assert len(store) == 2
    assert store.longest(model, [2, 5]) is None
    assert store.longest(model, [1, 5]) is not None


def test_a_damaged_entry_is_named_and_gone(tmp_path, caplog):
    how = {"bytes": SIZE, "directory": tmp_path}
    store, model = kvjax.PrefixStore(**how), small_model()
    for tokens in ((1,), (2,)):
        store.put(np.array(tokens), cache_of(tokens))
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert store.longest(model, [1, 5]) is None
    assert "cut off or changed" in caplog.text and len(store) == 1
    (about,) = tmp_path.glob("*/cache.json")
    about.write_text("{")
    caplog.clear()
    again = kvjax.PrefixStore(**how)
    assert len(again) == 0 and str(about) in caplog.text
    for tokens in ((1,), (2,)):  # it is in nobody's way
        again.put(np.array(tokens), cache_of(tokens))
    assert len(kvjax.PrefixStore(**how)) == 1


def test_tokens_of_another_text_are_not_believed(tmp_path, caplog):
    how = {"bytes": SIZE, "directory": tmp_path}
    store, model = kvjax.PrefixStore(**how), small_model()
    for tokens in ((1,), (2,)):
        store.put(np.array(tokens), cache_of(tokens))
    (file,) = tmp_path.glob("*/tokens.json")
    file.write_text(file.read_text().replace("1", "3"))
    assert kvjax.PrefixStore(**how).longest(model, [3, 5]) is None
    assert str(file) in caplog.text


def test_a_model_that_is_gone_and_a_directory_that_is_full(tmp_path, caplog):
    """One entry is lost at most, and what is asked for is answered."""
    store = kvjax.PrefixStore(bytes=SIZE, directory=tmp_path)
    gone = jax.tree.map(jnp.copy, small_model())
    store.put([1], kvjax.prefill(gone, np.array([[1]], np.int32))[1])
    del gone
    gc.collect()
    store.put([2], cache_of((2,)))
    assert len(store) == 2 and not caplog.text
    for folder in tmp_path.iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    tmp_path.rmdir()
    tmp_path.touch()  # a file where the directory was
    store.put([3], cache_of((3,)))
    assert "is lost" in caplog.text
    assert store.longest(small_model(), [3, 1]) is not None
    tmp_path.unlink()


def test_bodies_on_the_host_are_the_host_s():
    there = cache_of((1, 2, 3), "quest").closed().placed("host")
    beside = there.host_nbytes
    assert beside
    with pytest.raises(ValueError, match="`host_bytes`, 0"):
        kvjax.PrefixStore(bytes=2**20).put([1, 2, 3], there)
    store = kvjax.PrefixStore(bytes=2**20, host_bytes=beside)
    store.put([1, 2, 3], there)
    assert (store.nbytes, store.host_nbytes) == (there.nbytes - beside, beside)
    other = cache_of((4, 5, 6), "quest").closed().placed("host")
    store.put([4, 5, 6], other)
    assert len(store) == 1 and store.host_nbytes == beside


def test_other_weights_of_the_same_arrays():
    """Training goes on in place: what was read before is no prefix any more."""
    model = jax.tree.map(jnp.copy, small_model())
    store = kvjax.PrefixStore(bytes=2**20)
    _, cache = kvjax.prefill(model, TEXT[None, :9])
    store.put(TEXT[:9], cache)
    assert store.longest(model, TEXT) is not None
    weight = model.layers.mlp.up.kernel
    weight[...] = weight[...] * 1.001
    gc.collect()
    assert store.longest(model, TEXT) is None
    with pytest.raises(ValueError, match="its weights differ"):
        kvjax.prefill(model, TEXT[None, 9:], prefix=cache)


@wrong_types
def test_what_is_not_taken(tmp_path):
    model, store = small_model(), kvjax.PrefixStore(bytes=SIZE)
    held = cache_of((1, 2, 3))
    wrong = {
        "other tokens": ([1, 2, 4], held),
        "it has seen 3": ([1, 2], held),
        "shape \\[T\\]": ([[1, 2, 3]], held),
        "of one row": ([1, 2, 3], held.fork(2)),
        "must be a KVCache": ([1, 2, 3], None),
        "more than the store's `bytes`": (TEXT, kvjax.prefill(model, TEXT[None])[1]),
        "saw a question": (
            [1, 2],
            kvjax.prefill(model, np.array([[1, 2]]), None, aware())[1],
        ),
    }
    nobody_s = jax.jit(lambda m: kvjax.prefill(m, np.array([[1, 2]]))[1])(model)
    wrong["does not say what made it"] = ([1, 2], nobody_s)
    for words, (tokens, cache) in wrong.items():
        with pytest.raises(ValueError, match=words):
            store.put(tokens, cache)  # type: ignore[arg-type]
    assert not len(store)
    wrongs: list[Any] = [{"bytes": -1}, {"bytes": 1.5}, {"bytes": 1, "host_bytes": -1}]
    for fields in wrongs:
        with pytest.raises(ValueError, match="bytes"):
            kvjax.PrefixStore(**fields)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        kvjax.PrefixStore(bytes=1, directory=tmp_path / "file")
    with pytest.raises(ValueError, match="shape \\[T\\]"):
        store.longest(model, [])
    with pytest.raises(ValueError, match="ids from 0 on; got 5 to 4294967301"):
        store.longest(model, np.array([2**32 + 5, 5]))
    with pytest.raises(ValueError, match="must be a kvjax.Compression; got 'snapkv'"):
        store.longest(model, [1, 2], "snapkv")  # type: ignore[arg-type]


def aware() -> kvjax.Compression:
    return kvjax.compression("knorm", visibility="query_aware")
