"""Caches in files: bit for bit what they were, and refused where they are not."""

import dataclasses
import gc
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache.files import FILE
from kvjax.models import Decoder
from tests.small import (
    LENGTHS,
    PRESETS,
    batch,
    one_per_structure,
    preset,
    small_model,
)
from tests.typecheck import wrong_types


def prefilled(name: str, **fields) -> kvjax.KVCache:
    prompt, _, _ = batch()
    how = (small_model(), prompt, LENGTHS, preset(name))
    return kvjax.prefill(*how, max_new_tokens=20, **fields)[1]


def assert_same(one: kvjax.KVCache, other: kvjax.KVCache) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.sweep(6, 30)
@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name, tmp_path):
    cache = prefilled(name)
    cache.save(tmp_path / "there")
    again = kvjax.load_cache(tmp_path / "there", small_model())
    assert_same(cache, again)
    assert again.nbytes == cache.nbytes


@one_per_structure(1, 3)
def test_answers_are_the_same_to_the_bit(name, tmp_path):
    cache, (_, later, _) = prefilled(name), batch()
    cache.save(tmp_path)
    again = kvjax.load_cache(tmp_path, small_model())
    ours, one = kvjax.extend(small_model(), cache, later[:, :20])
    theirs, other = kvjax.extend(small_model(), again, later[:, :20])
    np.testing.assert_array_equal(ours, theirs)
    assert_same(one, other)


def test_what_is_shared_is_saved_once(tmp_path):
    """Also where layers that were together are apart behind the prefix."""
    prompt, later, _ = batch()
    _, front = kvjax.prefill(small_model(), prompt[:1], None, preset("kivi_2bit"))
    codes = {"type": "affine", "bits": 8, "axis": "token", "group": 32}
    apart = [{"first": 1, "store": {"keys": codes, "values": codes}}]
    c = kvjax.compression("knorm", layers=apart)
    _, cache = kvjax.prefill(small_model(), later, None, c, prefix=front)
    assert len(cache.groups) == 2
    cache.save(tmp_path)
    again = kvjax.load_cache(tmp_path, small_model())
    assert_same(cache, again)
    assert again.nbytes == cache.nbytes
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size < cache.nbytes + 20_000
    assert again.provenance is not None and again.provenance.prefix is not None


def test_bfloat16(tmp_path):
    prompt, _, _ = batch()
    _, cache = kvjax.prefill(small_model("bfloat16"), prompt, LENGTHS)
    cache.save(tmp_path)
    assert_same(cache, kvjax.load_cache(tmp_path, small_model("bfloat16")))
    with pytest.raises(ValueError, match="its dtype differs"):
        kvjax.load_cache(tmp_path, small_model())


def test_only_for_the_model_that_made_it(tmp_path):
    """The same numbers loaded again are that model; others are named."""
    model = small_model()
    prefilled("none").save(tmp_path)
    copy = jax.tree.map(jnp.copy, model)
    assert_same(kvjax.load_cache(tmp_path, copy), prefilled("none"))
    for other, said in [
        (small_model(std=0.09), "its weights differ"),
        (small_model(layers=3), "its shape differs"),
        (turned(model), "its RoPE differs"),
    ]:
        with pytest.raises(ValueError, match=said):
            kvjax.load_cache(tmp_path, other)


@wrong_types
def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="must be a kvjax Decoder"):
        kvjax.load_cache(tmp_path, "model")  # type: ignore[arg-type]


def turned(model: Decoder) -> Decoder:
    """The same weights under another RoPE."""
    copy = jax.tree.map(jnp.copy, model)
    rope = dataclasses.replace(model.config.rope, theta=500.0)
    copy.config = dataclasses.replace(model.config, rope=rope)
    return copy


def test_another_one_takes_its_place_whole(tmp_path, monkeypatch):
    """Or the old one stays: there is a whole cache at any time."""
    first, second = prefilled("none"), prefilled("snapkv")
    first.save(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kvjax.cache.files.write_json", full)
        with pytest.raises(OSError, match="No space"):
            second.save(tmp_path)
    assert_same(kvjax.load_cache(tmp_path, small_model()), first)
    second.save(tmp_path)
    assert_same(kvjax.load_cache(tmp_path, small_model()), second)
    assert len(list(tmp_path.iterdir())) == 2


def test_files_that_were_changed(tmp_path):
    prefilled("kivi_2bit").save(tmp_path)
    (arrays,) = tmp_path.glob("*.safetensors")
    about, whole = tmp_path / FILE, arrays.read_bytes()

    def refused(words: str, name: str) -> None:
        with pytest.raises(ValueError, match=words) as wrong:
            kvjax.load_cache(tmp_path, small_model())
        assert name in str(wrong.value)

    for broken in (whole[:-1], whole[:100], b"", whole[:-9] + b"\x01" + whole[-8:]):
        arrays.write_bytes(broken)
        refused("cut off or changed", arrays.name)
    arrays.unlink()
    refused("no file", arrays.name)
    arrays.write_bytes(whole)
    said = about.read_text()
    for broken, words in [
        (said[: len(said) // 2], "not JSON"),
        (said.replace('"bits": 2', '"bits": 4', 1), "was changed"),
        ("[]", "must hold a JSON object"),
        ("{}", "no cache that kvjax saved"),
        (json.dumps({"format": "kvjax cache", "version": 9}), "version 9"),
        (json.dumps({"format": "kvjax cache", "version": 1}), "was changed"),
    ]:
        about.write_text(broken)
        refused(words, FILE)
    about.unlink()
    refused("holds no cache", str(tmp_path))


@wrong_types
def test_what_is_not_overwritten(tmp_path):
    cache = prefilled("none")
    (tmp_path / FILE).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="no cache that kvjax saved"):
        cache.save(tmp_path)
    assert (tmp_path / FILE).read_text() == '{"mine": 1}'
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "", 3, tmp_path / "file" / "below"):
        with pytest.raises(ValueError):
            cache.save(place)  # type: ignore[arg-type]


def test_what_nobody_knows_is_not_saved(tmp_path):
    """A cache of a traced prompt, and one whose model is gone."""
    prompt, _, _ = batch()

    @jax.jit
    def made(tokens):
        return kvjax.prefill(small_model(), tokens)[1]

    def saved(cache):
        cache.save(tmp_path)
        return cache.length

    with pytest.raises(ValueError, match="outside of `jit`"):
        jax.jit(saved)(prefilled("none"))
    cache = dataclasses.replace(made(jnp.asarray(prompt)), provenance=None)
    with pytest.raises(ValueError, match="does not say what made it"):
        cache.save(tmp_path)
    lost = jax.tree.map(jnp.copy, small_model())
    _, cache = kvjax.prefill(lost, prompt, LENGTHS)
    del lost
    gc.collect()
    with pytest.raises(ValueError, match="is gone"):
        cache.save(tmp_path)
    assert not list(pathlib.Path(tmp_path).iterdir())
