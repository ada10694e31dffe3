"""The directory of a run: what is refused there before anything is computed."""

import gzip
import json
import os
import pathlib
import shutil

import pytest
import yaml

from kvjax import inputs
from kvjax.cli.main import main
from kvjax.models.bundled import model_directory
from kvjax.places import held
from kvjax.train.recipe import (
    CachedConfig,
    CompressionChoice,
    DataConfig,
    SamplingConfig,
    Source,
    Stage,
    TrainConfig,
    load_config,
)
from kvjax.train.run.directory import claimed
from kvjax.train.run.exported import begin_export, end_export
from kvjax.train.run.logs import check_log, opened
from tests.train.tiny_run import recipe


def begin(directory: pathlib.Path, config: TrainConfig) -> None:
    """A run begins, or goes on, and saves a step."""
    with claimed(directory, config) as claim:
        claim.begin()
        (directory / "checkpoints" / "step_1").mkdir(parents=True, exist_ok=True)


def refuses(directory: pathlib.Path, config: TrainConfig, *words: str) -> None:
    before = sorted(directory.rglob("*"))
    with pytest.raises(ValueError) as said, claimed(directory, config):
        raise AssertionError("not refused")
    for word in (*words, "--out"):
        assert word in str(said.value)
    assert sorted(directory.rglob("*")) == before


def test_an_evaluation_is_no_place_for_a_run(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    refuses(tmp_path, recipe(), "directory of an evaluation")
    path = tmp_path / "file"
    path.touch()
    assert main(["finetune", "--config", "tolerant", "--out", str(path)]) == 2
    assert "is a file" in capsys.readouterr().err


def test_another_run_is_going_on(tmp_path):
    with held(tmp_path):
        refuses(tmp_path, recipe(), "another run is writing")


def model(directory: pathlib.Path, text: str = "weights") -> pathlib.Path:
    path = directory / "model"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(text)
    return path


def test_a_model_that_no_run_made(tmp_path):
    path = model(tmp_path)
    refuses(tmp_path, recipe(), "would be overwritten", "no checkpoints")
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    refuses(tmp_path, recipe(), "would be overwritten", "no exported.json")
    shutil.rmtree(path)
    path.symlink_to("gone")
    refuses(tmp_path, recipe(), "it is no directory")
    path.unlink()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    refuses(tmp_path, recipe(), "adapter would be overwritten")


def test_the_model_that_the_run_made_may_be_replaced(tmp_path):
    begin(tmp_path, recipe())
    begin_export(tmp_path)
    path = model(tmp_path)
    begin(tmp_path, recipe())  # killed while it was written
    end_export(tmp_path)
    begin(tmp_path, recipe())
    (tmp_path / "adapter").mkdir()
    begin(tmp_path, recipe())
    (tmp_path / "adapter" / "adapter_config.json").touch()
    refuses(tmp_path, recipe(), "adapter_config.json is not of this run")
    shutil.rmtree(tmp_path / "adapter")
    (path / "notes.md").touch()
    refuses(tmp_path, recipe(), "notes.md is not of this run")
    (path / "notes.md").unlink()
    (path / "model.safetensors").write_text("WEIGHTS")
    refuses(tmp_path, recipe(), "model.safetensors has changed since")
    (path / "model.safetensors").unlink()
    begin(tmp_path, recipe())
    (path / "model.safetensors").write_text("weights")
    begin(tmp_path, recipe())
    shutil.rmtree(tmp_path / "checkpoints")
    refuses(tmp_path, recipe(), "no checkpoints")


@pytest.mark.parametrize("text", ["", "[]", '{"whole": 1, "files": {}}', "{}"])
def test_a_damaged_mark_of_the_model(tmp_path, text):
    begin(tmp_path, recipe())
    model(tmp_path)
    (tmp_path / "exported.json").write_text(text)
    with pytest.raises(ValueError, match=r"exported\.json"):
        begin(tmp_path, recipe())


def choice(path: pathlib.Path) -> CompressionChoice:
    path.write_text("evict: {score: knorm, budget: {type: uniform, keep: 0.5}}")
    return CompressionChoice(compression=str(path))


def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "data"
    path.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (path / name).write_text('{"text": "one"}\n')
    return path


def dataset(name: pathlib.Path | str, **fields) -> Source:
    return Source(dataset=str(name), text="text", **fields)


def given(kind: str, tmp_path: pathlib.Path) -> tuple[TrainConfig, pathlib.Path]:
    """A recipe that reads a file, and the file."""
    data = folder(tmp_path)
    file, yaml_file = data / "b.jsonl", tmp_path / "own.yaml"
    sources = {
        "file": dataset(file),
        "pattern": dataset(data / "*.jsonl"),
        "folder": dataset(data),
        "data_files": dataset("json", fields={"data_files": {"train": [str(file)]}}),
        "streamed": dataset(file, streaming=True),
    }
    if kind in sources:
        return recipe(data=DataConfig(sources=(sources[kind],))), file
    if kind == "stage":
        stage = Stage(steps=6, lengths={64: 1.0}, sources=(dataset(file),))
        return recipe(stages=(stage,)), file
    if kind == "sampling":
        choices = SamplingConfig(choices=(choice(yaml_file),))
        return recipe(sampling=choices), yaml_file
    if kind == "cached":
        return recipe(cached=CachedConfig(choices=(choice(yaml_file),))), yaml_file
    if kind in ("packed", "packed folder"):
        (data / "c.jsonl.gz").write_bytes(gzip.compress(b"{}"))
        name = data if kind == "packed folder" else data / "c.jsonl.gz"
        return recipe(data=DataConfig(sources=(dataset(name),))), data / "c.jsonl.gz"
    shutil.copytree(model_directory("kvjax-tiny"), tmp_path / "init")
    if kind == "base":
        (tmp_path / "adapter").mkdir()
        about = json.dumps({"base_model_name_or_path": str(tmp_path / "init")})
        (tmp_path / "adapter" / "adapter_config.json").write_text(about)
        config = recipe(model=None, init=str(tmp_path / "adapter"))
        return config, tmp_path / "init" / "model.safetensors"
    if kind == "template":
        file = tmp_path / "init" / "additional_chat_templates" / "tools.jinja"
        file.parent.mkdir()
        file.write_text("one")
        return recipe(model=None, init=str(tmp_path / "init")), file
    named = {"weights": "model.safetensors", "tokenizer": "tokenizer.json"}
    fields = {"model": None, "init": str(tmp_path / "init")}
    return recipe(**fields), tmp_path / "init" / named[kind]


KINDS = ("file", "pattern", "folder", "data_files", "streamed", "stage", "sampling")


OTHERS = ("cached", "weights", "tokenizer", "base", "template")


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS, "packed", "packed folder"])
def test_an_input_that_changes_is_named(kind, tmp_path):
    config, file = given(kind, tmp_path)
    run, before, times = tmp_path / "run", file.read_bytes(), file.stat()
    begin(run, config)
    begin(run, config)
    changed = before.replace(b"one", b"two").replace(b"0.5", b"0.4")
    if changed == before:  # a byte in the middle of it
        middle = len(before) // 2
        changed = before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :]
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    shown = "base of " if kind == "base" else str(file)
    refuses(
        run, config, f"{shown}", f"{file.name} has changed since", " then, ", " now)"
    )
    file.write_bytes(before)
    begin(run, config)
    assert load_config(run / "recipe.yaml") == config


def test_files_that_come_and_go(tmp_path):
    config, file = given("folder", tmp_path)
    run = tmp_path / "run"
    begin(run, config)
    (file.parent / "c.jsonl").write_text("{}")
    refuses(run, config, "c.jsonl is new since")
    (file.parent / "c.jsonl").unlink()
    (file.parent / "c.jsonl.gz").write_bytes(b"")
    refuses(run, config, "c.jsonl.gz is new since")
    (file.parent / "c.jsonl.gz").unlink()
    file.unlink()
    refuses(run, config, "b.jsonl has gone since")


def test_a_comment_changes_no_compression(tmp_path):
    config, file = given("sampling", tmp_path)
    begin(tmp_path / "run", config)
    file.write_text(f"# Half of it.\n{file.read_text()}\n")
    begin(tmp_path / "run", config)


def test_files_are_hashed_once(tmp_path, monkeypatch):
    config, file = given("folder", tmp_path)
    for one in file.parent.iterdir():
        os.utime(one, ns=(10**18, 10**18))
    monkeypatch.setattr(inputs, "YOUNG_NS", -(10**18))
    read, plain = [], inputs.digest
    monkeypatch.setattr(inputs, "digest", lambda one: read.append(one) or plain(one))
    run = tmp_path / "run"
    begin(run, config)
    begin(run, config)
    assert len(read) == 2
    os.utime(file)
    begin(run, config)
    begin(run, config)
    assert len(read) == 3
    monkeypatch.setattr(inputs, "MOST_FILES", 1)
    other = tmp_path / "other"
    begin(other, config)
    begin(other, config)
    assert len(read) == 5
    file.write_text("{}")
    refuses(other, config, "2 files has changed")


def test_a_file_that_is_young_is_read_again(tmp_path):
    file = tmp_path / "file"
    file.write_text("one")
    known = inputs.of_files({"file": file}, {})
    if " " in known["file"]:
        pytest.skip("the disk was slower than a file is young")
    file.write_text("two")
    assert inputs.of_files({"file": file}, known) != known


def test_a_run_that_reads_nothing_goes_on(tmp_path, caplog):
    begin(tmp_path / "run", recipe())
    begin(tmp_path / "run", recipe())
    assert not caplog.text


def test_a_run_of_an_earlier_version_goes_on(tmp_path, caplog):
    config, file = given("file", tmp_path)
    run = tmp_path / "run"
    begin(run, config)
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    assert tree.pop("inputs")
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    begin(run, config)
    assert "no digests" in caplog.text
    file.write_text("{}")
    refuses(run, config, "b.jsonl has changed since")


@pytest.mark.parametrize("text", ["[1]", "{a: 1}", "{a: {b: 1}}", "x"])
def test_a_damaged_recipe(tmp_path, text):
    begin(tmp_path, recipe())
    path = tmp_path / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"inputs": yaml.safe_load(text)}))
    refuses(tmp_path, recipe(), "recipe.yaml cannot be read", "inputs")
    path.write_text(path.read_text()[:-40])
    refuses(tmp_path, recipe(), "recipe.yaml")


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b'{"loss": 1}',
        b'{"step": "4"}',
        b'{"step": 4',
        b'{"step": true}',
        b"\xff",
    ],
)
def test_a_damaged_log_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    whole = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(whole)
    for use in (check_log, lambda where: opened(where, recipe(), 1).__enter__()):
        with pytest.raises(ValueError, match="line 2 of .*remove the line"):
            use(tmp_path)
    assert path.read_bytes() == whole


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_log_that_is_no_file(tmp_path):
    for make, what in ((os.mkfifo, "a pipe"), (os.mkdir, "a directory")):
        make(tmp_path / "log.jsonl")
        for use in (check_log, lambda where: opened(where, recipe(), 1).__enter__()):
            with pytest.raises(ValueError, match=f"log.jsonl: it is {what}"):
                use(tmp_path)
        path = tmp_path / "log.jsonl"
        path.rmdir() if path.is_dir() else path.unlink()
