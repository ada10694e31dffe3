"""What an evaluation reads: a change of it between two calls is named."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.cache import provenance
from kvjax.eval import harness, record
from kvjax.eval.header import read_header
from kvjax.eval.record import fingerprint, sampled_fingerprint
from kvjax.places import held
from kvjax.train.data.tokenizer import save_tokenizer
from tests.eval import tiny

KNORM = "evict: {score: knorm, budget: {type: uniform, keep: 0.5}}\n"


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    """Directories are opened; no cell is computed."""

    class Nothing:
        rows = ()

        def __init__(self, model, made, store, progress):
            self.made = made

        def group(self, group):
            pass

    monkeypatch.setattr(harness, "_Runner", Nothing)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def files(tmp_path) -> pathlib.Path:
    """A checkpoint's files, a text and a compression."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_tokenizer(directory, 256)
    (directory / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "text.txt").write_text("The river runs. " * 200)
    (tmp_path / "own.yaml").write_text(KNORM)
    return tmp_path


def run(files: pathlib.Path, model, tokenizer=None, checkpoint: bool = True, **fields):
    text = {"name": "text", "path": str(files / "text.txt"), "context": 32}
    tasks = [{"name": "recall", "fields": {"value_length": 1}}, text]
    given = {"tasks": tasks, "compressions": [str(files / "own.yaml")], "items": 2}
    config = tiny.config(**given | {"model": str(files / "model")} | fields)
    where = files / "model" if checkpoint else None
    words = tokenizer or tiny.tokenizer()
    harness.run(model, words, config, files / "run", checkpoint=where)


def changes(file: pathlib.Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("own.yaml", "0.5", "0.4"),
        ("text.txt", "river", "rover"),
        ("model/tokenizer.json", "<unk>", "<odd>"),
        ("model/tokenizer_config.json", "256", "255"),
    ],
)
def test_an_input_that_changes_is_named(files, model, name, old, new):
    run(files, model)
    run(files, model)
    changes(files / name, old, new)
    with pytest.raises(ValueError, match="changed since.* then, .* now.*--out") as said:
        run(files, model)
    assert str(files / name) in str(said.value)
    changes(files / name, new, old)
    run(files, model)


def test_a_comment_changes_no_compression(files, model):
    run(files, model)
    changes(files / "own.yaml", "evict", "# Half.\nevict")
    run(files, model)


class Swapped:
    """A tokenizer with two of its tokens exchanged."""

    def __init__(self):
        self._own = tiny.tokenizer()

    def __getattr__(self, name):
        return getattr(self._own, name)

    def encode(self, text, **options):
        swap = {70: 71, 71: 70}
        return [swap.get(token, token) for token in self._own.encode(text, **options)]


def test_a_tokenizer_without_files(files, model):
    run(files, model, checkpoint=False)
    run(files, model)
    with pytest.raises(ValueError, match="what is asked .* has changed since"):
        run(files, model, Swapped(), checkpoint=False)


def test_a_second_evaluation_is_refused(files, model):
    left = files / "run" / "rows" / ".cell.parquet.1.tmp"
    run(files, model)
    left.touch()
    with held(files / "run"), pytest.raises(ValueError, match="another run is writing"):
        run(files, model)
    assert left.exists()
    run(files, model)
    assert not left.exists()


def test_a_run_of_an_earlier_version_goes_on(files, model, caplog):
    run(files, model)
    path = files / "run" / "run.json"
    header = json.loads(path.read_text())
    del header["inputs"], header["checkpoint"]
    samples = {"model_fingerprint": sampled_fingerprint(model)}
    path.write_text(json.dumps(header | samples))
    with pytest.raises(ValueError, match="model_fingerprint is"):
        run(files, tiny.model(init_std=0.2))
    run(files, model)
    assert "samples of the weights" in caplog.text
    after = read_header(files / "run")
    assert after["model_fingerprint"] == fingerprint(model)
    assert set(after["inputs"]) and after["checkpoint"]
    assert after["date"] == header["date"]


def test_a_fetched_model_says_where_it_is_from(files, model):
    run(files, model)
    path = files / "run" / "run.json"
    assert "source" not in read_header(files / "run")
    shutil.rmtree(files / "run")
    record = {"model": "Tiny", "from": "package index, tiny==1.0", "sha256": "0" * 64}
    (files / "model" / "kvjax_source.json").write_text(json.dumps(record))
    run(files, model)
    said = read_header(files / "run")["source"]
    assert said == f"Tiny, package index, tiny==1.0, sha256 {'0' * 64}"
    path.write_text(json.dumps({"schema": 3, "source": 3}))
    with pytest.raises(ValueError, match="`source` is not what an evaluation writes"):
        read_header(files / "run")


def test_a_checkpoint_that_is_one_file(files, model):
    path = files / "model.gguf"
    path.write_bytes(b"GGUF")
    for _ in range(2):
        config = tiny.config(model=str(path), items=2)
        where = files / "run"
        harness.run(model, tiny.tokenizer(), config, where, checkpoint=path)
    assert [*read_header(where)["checkpoint"]] == [str(path)]


def changed(model, change):
    """A copy with other values in one weight."""
    copy = nnx.clone(model)
    weight = copy.layers.mlp.up.kernel
    weight.set_value(jnp.asarray(change(np.array(weight.get_value()))))
    return copy


def swap(x: np.ndarray) -> np.ndarray:
    x[0, 0, [1, 3]] = x[0, 0, [3, 1]]
    return x


def flip(x: np.ndarray) -> np.ndarray:
    x.reshape(-1).view(np.uint32)[-7] ^= 1
    return x


@pytest.mark.parametrize("change", [swap, flip])
def test_every_value_of_a_model_counts(model, change):
    assert fingerprint(changed(model, lambda x: x)) == fingerprint(model)
    assert fingerprint(changed(model, change)) != fingerprint(model)


def test_pieces_of_any_size_give_one_fingerprint(model, monkeypatch):
    whole = fingerprint(model)
    monkeypatch.setattr(provenance, "PIECE", 100)
    # As on an accelerator.
    monkeypatch.setattr(provenance, "_in_sight", lambda x: False)
    sizes = []

    def noted(x):
        for piece in plain(x):
            sizes.append(piece.nbytes)
            yield piece

    plain = provenance._pieces
    monkeypatch.setattr(provenance, "_pieces", noted)
    copy = jax.tree.map(jnp.copy, model)
    assert fingerprint(copy) == whole and max(sizes) <= 100


def test_weights_are_looked_at_once_per_checkpoint(files, model, monkeypatch):
    monkeypatch.setattr("kvjax.inputs.YOUNG_NS", -(10**18))
    looked = []
    monkeypatch.setattr(record, "fingerprint", lambda m: looked.append(m) or "1-2")
    monkeypatch.setattr(record.origins, "fingerprint", lambda config: "1")
    run(files, model)
    run(files, model)
    assert len(looked) == 1
    (files / "model" / "model.safetensors").write_bytes(b"weights")
    run(files, model)
    run(files, model)
    assert len(looked) == 2
    run(files, model, checkpoint=False)
    assert len(looked) == 3


def test_weights_under_an_adapter_are_looked_at(files, model, monkeypatch):
    monkeypatch.setattr("kvjax.inputs.YOUNG_NS", -(10**18))
    looked = []
    monkeypatch.setattr(record, "fingerprint", lambda m: looked.append(m) or "1-2")
    monkeypatch.setattr(record.origins, "fingerprint", lambda config: "1")
    (files / "model").rename(files / "base")
    (files / "model").mkdir()
    about = json.dumps({"base_model_name_or_path": "../base"})
    (files / "model" / "adapter_config.json").write_text(about)
    run(files, model)
    run(files, model)
    assert len(looked) == 1
    (files / "base" / "model.safetensors").write_bytes(b"other weights")
    run(files, model)
    assert len(looked) == 2
    changes(files / "base" / "tokenizer.json", "<unk>", "<odd>")
    with pytest.raises(ValueError, match="base of .*tokenizer.json has changed"):
        run(files, model)


def test_a_directory_left_by_a_killed_beginning(files, model):
    (files / "run").mkdir()
    (files / "run" / ".run.json.1.tmp").touch()
    run(files, model)
    assert {p.name for p in (files / "run").iterdir()} == {
        *("run.json", "rows", "items", "maps")
    }
