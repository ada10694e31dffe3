"""`load` and `save`: what round-trips, and every way a checkpoint can be wrong."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvjax.compress.presets import compression
from kvjax.models import load, save
from kvjax.models import weights as weights_module
from kvjax.models.io import load_config
from kvjax.models.sampling import Sampling
from kvjax.models.stored_generation import sampling_of
from tests.typecheck import wrong_types

from .samples import CONFIGS, sample

NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A Llama in several shards, and a tied Gemma in one file."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "SHARD_BYTES", 8_000)
        save(sample("llama"), folder / "llama")
    save(sample("gemma3_text"), folder / "gemma")
    return folder


@pytest.fixture
def llama(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved / "llama", tmp_path / "llama")


@pytest.fixture
def gemma(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved / "gemma", tmp_path / "gemma")


def change(directory: pathlib.Path, name: str, edit) -> None:
    """Rewrite one tensor (None: drop it) of an unsharded checkpoint."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    new = edit(tensors.pop(name))
    if new is not None:
        tensors[name] = np.ascontiguousarray(new)
    save_file(tensors, path, metadata={"format": "pt"})


def fails(directory: pathlib.Path, match: str, dtype="float32") -> None:
    with pytest.raises(ValueError, match=match):
        load(directory, dtype, tokenizer=False)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_round_trip(family, tmp_path):
    model = sample(family)
    save(model, tmp_path)
    again, tokenizer = load(str(tmp_path), "float32", tokenizer=False)
    assert tokenizer is None and again.config == model.config
    ours, theirs = nnx.state(model), nnx.state(again)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_dtypes(gemma, source, target):
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(source, source)
    tensors = load_file(gemma / "model.safetensors")
    cast = {name: value.astype(kind) for name, value in tensors.items()}
    save_file(cast, gemma / "model.safetensors", metadata={"format": "pt"})
    model, _ = load(gemma, target, tokenizer=False)
    expected = cast["model.layers.0.mlp.up_proj.weight"].astype(jnp.dtype(target))
    assert model.dtype == jnp.dtype(target)
    np.testing.assert_array_equal(model.layers.mlp.up.kernel[0], expected.T)


def test_default_dtype_is_bfloat16_and_unknown_ones_are_named(gemma):
    assert load(gemma, tokenizer=False)[0].dtype == jnp.bfloat16
    fails(gemma, "float32.*got 'float23'", "float23")
    fails(gemma, "must be one of", "int8")


def test_shards_hold_what_their_index_says(saved):
    index = json.loads((saved / "llama/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (saved / "llama").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    held = [load_file(saved / "llama" / file) for file in files]
    assert {k for part in held for k in part} == set(index["weight_map"])
    total = sum(value.nbytes for part in held for value in part.values())
    assert index["metadata"]["total_size"] == total


def test_saving_again_removes_earlier_shards(llama):
    model, _ = load(llama, tokenizer=False)
    save(model, llama)
    assert [p.name for p in llama.glob("model*")] == ["model.safetensors"]
    assert load(llama, tokenizer=False)[0].config == model.config


def test_a_full_disk_leaves_what_was_there(llama, tmp_path, monkeypatch):
    model, _ = load(llama, tokenizer=False)
    before = {p.name: p.read_bytes() for p in llama.iterdir()}

    def full(path, tensors, pieces, total):
        del tensors, pieces, total
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "write_safetensors", full)
    for directory in (llama, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            save(model, directory)
    assert {p.name: p.read_bytes() for p in llama.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_save_refuses_what_the_family_cannot_store(tmp_path):
    model = sample("llama")
    model.config = CONFIGS["qwen3"]
    model.config.__dict__["family"] = "llama"
    try:
        with pytest.raises(ValueError, match="cannot store.*qk_norm"):
            save(model, tmp_path)
    finally:
        model.config.__dict__["family"] = "qwen3"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save(sample("llama"), tmp_path / "file")


def test_generation_config_has_the_stop_tokens(gemma):
    path = gemma / "generation_config.json"
    assert json.loads(path.read_text())["eos_token_id"] == [2, 3]
    path.write_text('{"eos_token_id": [5, 6, 7]}')
    assert load_config(gemma).eos_tokens == (5, 6, 7)


def test_all_of_generation_config_survives(gemma, tmp_path):
    given = {"do_sample": True, "temperature": 0.6, "top_k": 64, "cache": [None, 1]}
    path = gemma / "generation_config.json"
    path.write_text(json.dumps({**given, "eos_token_id": 3}))
    model, _ = load(gemma, tokenizer=False)
    save(model, tmp_path / "again")
    found = json.loads((tmp_path / "again" / path.name).read_text())
    assert {name: found[name] for name in given} == given
    assert found["eos_token_id"] == 3
    drawn, others = sampling_of(json.loads(model.config.generation))
    assert drawn == Sampling(temperature=0.6, top_k=64) and not others
    greedy, others = sampling_of({"temperature": 0.6, "repetition_penalty": 1.1})
    assert greedy.greedy and others == {"repetition_penalty": 1.1}
    for wrong in ({"temperature": "hot"}, {"do_sample": True, "top_p": 2}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f"{path.name}.*{[*wrong][-1]}"):
            load_config(gemma)


def test_ids_outside_of_the_vocabulary_are_left_out(gemma, caplog):
    settings = json.loads((gemma / "config.json").read_text())
    settings |= {"pad_token_id": -1, "bos_token_id": 10**6}
    (gemma / "config.json").write_text(json.dumps(settings))
    (gemma / "generation_config.json").write_text('{"eos_token_id": [2, 10000]}')
    config = load_config(gemma)
    assert (config.pad_token, config.bos_token, config.eos_tokens) == (None, None, (2,))
    assert load_config(gemma) == config
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "1000000" in said[0] and "10000" in said[1]


def test_a_save_removes_what_saves_wrote_and_nothing_else(llama):
    (llama / "model-of-mine.safetensors").write_bytes(b"mine")
    (llama / ".saving-killed").mkdir()
    model, _ = load(llama, tokenizer=False)
    save(model, llama)
    found = {path.name for path in llama.iterdir() if "saf" in path.name}
    assert found == {"model.safetensors", "model-of-mine.safetensors"}
    assert not (llama / ".saving-killed").exists()


def test_one_model_is_saved_as_the_same_bytes(llama, tmp_path):
    model, _ = load(llama, "float32", tokenizer=False)
    for folder in ("a", "b"):
        save(model, tmp_path / folder)
    a, b = (
        {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
        for folder in ("a", "b")
    )
    assert a == b
    model.embedding[...] += 1
    save(model, tmp_path / "b")
    number = [json.loads((tmp_path / x / "config.json").read_text()) for x in "ab"]
    assert number[0].pop("kvjax_save") != number[1].pop("kvjax_save")
    assert number[0] == number[1]


def test_weights_and_config_of_two_saves(llama, gemma):
    shutil.copy(gemma / "model.safetensors", llama / "model.safetensors")
    fails(llama, "of two saves.*Save the model there again")


def second(directory: pathlib.Path) -> pathlib.Path:
    return sorted(directory.glob("model-*.safetensors"))[1]


def test_missing_shard(llama):
    path = second(llama)
    path.unlink()
    fails(llama, f"{path.name} is missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(llama, keep):
    path = second(llama)
    path.write_bytes(path.read_bytes()[:keep])
    fails(llama, f"{path.name} is not a complete")


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", 3]
)
def test_index_outside_its_directory(llama, file):
    path = llama / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = file
    path.write_text(json.dumps(index))
    fails(llama, "must lie in the directory")


def test_index_that_promises_too_much(llama):
    path = llama / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    fails(llama, f"places 'ghost' in .*{index['weight_map'][NORM]}")
    path.write_text("{}")
    fails(llama, "no `weight_map`")


def test_tensors_that_do_not_fit_the_config(gemma):
    change(gemma, UP, lambda x: x[:-1])
    fails(gemma, r"up_proj.weight' has shape \(23, 16\) in .*; .*\(24, 16\)")


def test_missing_and_unexpected_tensors(gemma, saved, tmp_path):
    change(gemma, UP, lambda x: None)
    fails(gemma, "lacks 1 of .*layers.1.mlp.up_proj.weight.*Did you mean")
    other = shutil.copytree(saved / "gemma", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors[NORM]
    save_file(tensors, other / "model.safetensors")
    load(other, tokenizer=False)
    tensors["model.layers.9.extra"] = tensors[NORM]
    save_file(tensors, other / "model.safetensors")
    fails(other, "holds 1 tensors .*layers.9.extra")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(gemma, value):
    change(gemma, UP, lambda x: np.where(np.arange(x.size).reshape(x.shape), x, value))
    for dtype in ("float32", "bfloat16"):
        fails(gemma, "up_proj.weight' in .*NaN or Inf", dtype)


def test_weights_that_overflow_the_dtype(gemma):
    change(gemma, UP, lambda x: x + np.float32(1e6))
    load(gemma, "bfloat16", tokenizer=False)
    fails(gemma, "overflows float16", "float16")


def test_quantised_weights(gemma):
    change(gemma, UP, lambda x: x.astype(np.int8))
    fails(gemma, "is I8; expected one of")


def test_tied_head_stored_twice(gemma):
    tensors = load_file(gemma / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, gemma / "model.safetensors")
    load(gemma, tokenizer=False)
    tensors["lm_head.weight"][3, 2] += 1
    save_file(tensors, gemma / "model.safetensors")
    fails(gemma, "ties the head .* differs")


def test_directories_that_are_no_checkpoints(tmp_path, gemma):
    fails(tmp_path, "config.json")
    (gemma / "model.safetensors").rename(gemma / "pytorch_model.bin")
    fails(gemma, "pickled weights.*Convert them to safetensors")
    (gemma / "pytorch_model.bin").unlink()
    fails(gemma, "neither model.safetensors nor")
    (gemma / "config.json").write_text("{not json")
    fails(gemma, "config.json is not JSON")
    (gemma / "config.json").write_text("[1]")
    fails(gemma, "must hold a JSON object")


@pytest.mark.parametrize(
    "name", ["/no/such/dir", "./nothing", "~/nothing/here", "a/b/c", "gpt2", ""]
)
def test_names_that_are_neither_directory_nor_hub_id(name):
    if name:
        fails(pathlib.Path(name), "neither a directory, a GGUF file nor a hub id")
    else:
        with pytest.raises(ValueError):
            load(name)


def test_hub_ids(saved, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot(name, *, revision, allow_patterns, ignore_patterns):
        assert revision is None and ignore_patterns == ["*/*"]
        calls.append((name, allow_patterns))
        if name == "owner/missing":
            raise OSError("404")
        return str(saved / "gemma")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model, _ = load("owner/gemma-3.1_b", tokenizer=False)
    assert model.config == CONFIGS["gemma3_text"]
    assert not [p for _, some in calls for p in some if "*" in p or ".bin" in p]
    with pytest.raises(ValueError, match="owner/missing.*could not be fetched.*404"):
        load("owner/missing")


@wrong_types
@pytest.mark.parametrize("given", [None, b"x", 3, ["owner/name"], object()])
def test_arguments_of_other_types(given, tmp_path):
    with pytest.raises(
        ValueError, match="a directory, a GGUF file or a hub id of the form.* got "
    ):
        load(given)
    with pytest.raises(ValueError, match="path of a directory; got "):
        load_config(given)
    with pytest.raises(ValueError, match="path of a directory; got "):
        save(sample("llama"), given)
    with pytest.raises(ValueError, match="preset or a path to a .yaml file; got "):
        compression(given)


def test_what_is_no_tokenizer_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="`tokenizer` must be .*; got 'tok'"):
        save(sample("llama"), tmp_path / "new", "tok")
    with pytest.raises(ValueError, match="`tokenizer` must be .*; got <class"):
        save(sample("llama"), tmp_path / "new", dict)
    assert not (tmp_path / "new").exists()
