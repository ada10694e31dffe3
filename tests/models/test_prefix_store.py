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
    assert len(kvjax.PrefixStore(**how)) == 0
    assert str(about) in caplog.text


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


def aware() -> kvjax.Compression:
    return kvjax.compression("knorm", visibility="query_aware")
