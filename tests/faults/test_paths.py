"""Paths that are none, too long, no text, links to nowhere: one answer everywhere."""

import json
import os
import pathlib
import shutil

import pytest

from kvjax.cli.main import main
from kvjax.models import load, load_config, save
from kvjax.models.bundled import shape_of
from tests.models.samples import sample
from tests.models.test_saved_tokenizers import words
from tests.typecheck import wrong_types

LONG = "a" * 5000


class Path:
    """A path whose text is whatever."""

    def __init__(self, text):
        self.text = text

    def __fspath__(self):
        return self.text


@wrong_types
@pytest.mark.parametrize("given", ["", Path(""), Path(b"x"), Path(3), Path(None), 3])
def test_what_is_no_path(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [load, load_config, lambda path: save(sample("llama"), path)]
    for call in calls + [shape_of] * (given == ""):
        with pytest.raises(ValueError, match="Expected .*; got .{2,}"):
            call(given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [LONG, "b" * 300, "a\0b", "loop", "nowhere"])
def test_names_that_nothing_can_have(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    for call in (load, load_config, shape_of):
        with pytest.raises(ValueError) as said:
            call(given)
        assert len(str(said.value)) < 2500 and repr(given[:20])[:-1] in str(said.value)
    with pytest.raises(
        ValueError, match="cannot be written .* Save to another"
    ) as said:
        save(sample("llama"), given)
    assert len(str(said.value)) < 600 and len(list(tmp_path.iterdir())) == 2


def test_names_that_are_no_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, model = os.fsdecode(b"m\xff"), sample("qwen3")
    calls = [
        lambda: save(model, name, words()),
        lambda: save(model, tmp_path / name),
        lambda: load(name),
        lambda: load_config(name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"m.udcff.*not UTF-8.*Rename it"):
            call()
    assert main(["convert", "x", name]) == 2
    assert main(["generate", "--model", "", "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert "not UTF-8" in said and "hub id of the form 'owner/name'; got ''" in said
    assert not list(tmp_path.iterdir())
    save(model, "größe", words())
    assert load("größe")[0].config == model.config


def test_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(sample("qwen3"), "~/model")
    assert load_config("~/model") == load_config(tmp_path / "model")


def adapter(folder: pathlib.Path, base: str) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_base_models_with_such_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (LONG, "b" * 300, f"{'c' * 300}/d", "a\0b", "~nobody/x"):
        lora = adapter(tmp_path / "lora", name)
        with pytest.raises(ValueError, match="The base model of .*Set `base_m") as said:
            load(lora)
        assert len(str(said.value)) < 2500


def test_a_folder_of_the_cache_of_the_hub(one, tmp_path):
    folder = tmp_path / "models--owner--name"
    commit = shutil.copytree(one, folder / "snapshots" / ("0" * 40))
    for call in (load, load_config, shape_of):
        with pytest.raises(
            ValueError, match="snapshots/<commit>.*'owner/name'"
        ) as said:
            call(folder)
        assert commit.name in str(said.value)
    lora = adapter(tmp_path / "lora", str(folder))
    with pytest.raises(ValueError, match="base model of .*snapshots/<commit>"):
        load(lora)
    assert load(commit, "float32", tokenizer=False)[0].config == load_config(one)


@wrong_types
@pytest.mark.parametrize(
    "given",
    [",", "\ud800", {"names": ["a"]}, "x" * 9000, "f4,f4", [("a", 3)], "bfloat", 3, ""],
)
def test_dtypes_that_are_none(given, one):
    with pytest.raises(ValueError, match=r"`dtype` must be one of .*; got ") as said:
        load(one, given)
    assert len(str(said.value)) < 600
