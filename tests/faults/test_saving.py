"""`save` of what `load` would refuse, and over what was there: nothing is lost."""

import dataclasses
import json
import pathlib
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from kvjax.cli.main import main
from kvjax.models import Decoder, load, save
from kvjax.models import weights as weights_module
from tests.models.samples import CONFIGS, sample
from tests.typecheck import wrong_types


@pytest.fixture
def kept(tmp_path) -> pathlib.Path:
    """A good checkpoint, in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "SHARD_BYTES", 8_000)
        save(sample("llama"), tmp_path / "kept")
    return tmp_path / "kept"


def held(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(model, folder: pathlib.Path, match: str, tokenizer=None) -> str:
    """Nothing is changed there, and nothing made elsewhere."""
    before = held(folder)
    for place in (folder, folder.parent / "new"):
        with pytest.raises(ValueError, match=match) as said:
            save(model, place, tokenizer)
        assert len(str(said.value)) < 900
    assert held(folder) == before and not (folder.parent / "new").exists()
    return str(said.value)


def edited(edit, family: str = "llama") -> Decoder:
    """A model of which one parameter is another."""
    model = sample(family)
    model.layers.mlp.up.kernel = nnx.Param(edit(model.layers.mlp.up.kernel[...]))
    return model


def spoilt(value):
    return lambda x: np.where(
        np.arange(x.size).reshape(x.shape) == x.size - 1, value, x
    )


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (spoilt(np.nan), r"layers\.2\.mlp\.up_proj\.weight' of the model holds NaN"),
        (spoilt(np.inf), "holds NaN or Inf"),
        (spoilt(-np.inf), "holds NaN or Inf"),
        (lambda x: x[..., :-1], r"up\.kernel' has shape .*config implies"),
        (lambda x: x[:1], r"up\.kernel' has shape .*config implies"),
        (lambda x: x[0], r"up\.kernel' has shape .*config implies"),
        (lambda x: np.asarray(x).astype(np.int8), "is int8, which"),
        (lambda x: np.asarray(x).astype(bool), "is bool, which"),
        (lambda x: np.asarray(x).astype(np.complex64), "is complex64, which"),
        (lambda x: np.asarray(x).astype(ml_dtypes.float8_e4m3fn), "is float8_e4m3fn"),
        (lambda x: np.asarray(x).astype(ml_dtypes.int4), "is int4, which"),
        (lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), "holds no numbers"),
    ],
)
def test_weights_that_load_would_refuse(kept, edit, match):
    refused(edited(edit), kept, match)


def test_all_of_a_model_of_another_dtype(kept):
    model = sample("llama")
    state = jax.tree.map(lambda x: np.asarray(x).astype(np.int8), nnx.state(model))
    nnx.update(model, state)
    refused(model, kept, "is int8, which")


def test_a_tensor_of_two_dtypes(kept):
    refused(edited(lambda x: x.astype(jnp.bfloat16), "phi3"), kept, "several dtypes")
    model = edited(lambda x: x.astype(jnp.bfloat16))  # a tensor of its own
    save(model, kept)
    assert load(kept, "float32", tokenizer=False)[0].config == model.config


@wrong_types
def test_what_is_no_whole_model(kept):
    model = sample("llama")
    words = "`model` must be a kvjax Decoder; got"
    for given in (None, (model, None), nnx.state(model), model.config, "llama", {}):
        refused(given, kept, words)
    fake = type("Fake", (), {"config": model.config})()
    refused(fake, kept, words)
    abstract = nnx.eval_shape(lambda: sample("llama"))
    refused(abstract, kept, "holds no numbers.*eval_shape")
    lacking = sample("llama")
    del lacking.layers.mlp.up.kernel
    refused(lacking, kept, r"has no parameter 'layers\.mlp\.up\.kernel'")
    setattr(model, "extra", nnx.Param(jnp.zeros(3)))  # noqa: B010
    refused(model, kept, "has a parameter 'extra'")
    gone = sample("llama")
    gone.embedding[...].delete()
    refused(gone, kept, "was donated")
    other = sample("llama")
    other.config = dataclasses.replace(other.config, generation='{"top_p": 3}')
    refused(other, kept, "generation_config.*top_p")


def test_traced_parameters(kept):
    graph, state = nnx.split(sample("llama"))

    def step(state):
        save(nnx.merge(graph, state), kept)

    with pytest.raises(ValueError, match="holds no numbers.*outside of jit"):
        jax.eval_shape(step, state)


def test_beside_an_adapter(kept, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    before = held(adapter)
    with pytest.raises(ValueError, match="holds an adapter.*another directory"):
        save(sample("llama"), adapter)
    assert main(["convert", str(kept), str(adapter), "--overwrite"]) == 2
    assert "holds an adapter" in capsys.readouterr().err
    assert held(adapter) == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_directory_in_the_place_of_a_file(kept, name):
    (kept / name).unlink()
    (kept / name).mkdir()
    before = held(kept)
    with pytest.raises(ValueError, match=f"{name} is a directory; .* a file there"):
        save(sample("llama"), kept)
    assert held(kept) == before


def test_a_save_that_fails_removes_nothing_of_another(tmp_path, monkeypatch):
    """The second of two saves into one new directory is refused and harms nothing."""
    inside, go, write = threading.Event(), threading.Event(), weights_module.mark
    folder, model = tmp_path / "new", sample("llama")

    def slow(*given):
        inside.set()
        assert go.wait(20)
        write(*given)

    monkeypatch.setattr(weights_module, "mark", slow)
    first = threading.Thread(target=save, args=(model, folder))
    first.start()
    try:
        assert inside.wait(20)
        with pytest.raises(ValueError, match="another process is saving"):
            save(model, folder)
    finally:
        go.set()
        first.join()
    assert load(folder, "float32", tokenizer=False)[0].config == CONFIGS["llama"]


def test_a_failed_move_into_a_new_directory_leaves_none(tmp_path, monkeypatch):
    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvjax.models.saving.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        save(sample("llama"), tmp_path / "new" / "model")
    assert not (tmp_path / "new").exists()


def test_numbers_of_saves_with_other_tokenizers(kept):
    """`load` sees a kill between the files of a tokenizer by the number of the save."""
    from tests.models.test_saved_tokenizers import words

    model, found = sample("llama"), []
    for template in ("a", "b", "a"):
        save(model, kept, words(template))
        found.append(json.loads((kept / "config.json").read_text())["kvjax_save"])
    assert found[0] == found[2] != found[1]
