"""Of a repository on the hub, what will be loaded is fetched, and nothing else."""

import json
import pathlib
import shutil

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from kvjax.models import load
from kvjax.models.hub import checkpoint_directory
from tests.faults.files import INDEX, SINGLE
from tests.models.samples import sample

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADAPTER = "adapter_model.safetensors"
OTHER = (
    "README.md",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "original/params.json",
    "original/consolidated.safetensors",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/config.json",
    "checkpoint-500/tokenizer.json",
    "onnx/vocab.txt",
    "trainer_state.json",
    "optimizer.pt",
    "code.py",
)


class Hub:
    """`huggingface_hub` over a folder: what it is asked for, and what it copies."""

    def __init__(self, repository: pathlib.Path, cache: pathlib.Path):
        self.repository, self.folder = repository, cache / COMMIT
        self.revisions: list[str | None] = []

    def snapshot_download(
        self, name, *, revision=None, allow_patterns, ignore_patterns
    ) -> str:
        assert name == "owner/name"
        self.revisions.append(revision)
        for file in filter_repo_objects(
            self.list_repo_files(name),
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / file, self.folder / file)
        self.folder.mkdir(parents=True, exist_ok=True)
        return str(self.folder)

    def list_repo_files(self, name, *, revision=None) -> list[str]:
        del name, revision
        found = (p for p in self.repository.rglob("*") if p.is_file())
        return [p.relative_to(self.repository).as_posix() for p in found]

    @property
    def fetched(self) -> set[str]:
        found = (p for p in self.folder.rglob("*") if p.is_file())
        return {p.relative_to(self.folder).as_posix() for p in found}


def published(directory: pathlib.Path, monkeypatch, tmp_path, *more: str) -> Hub:
    for name in (*OTHER, *more):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    hub = Hub(directory, tmp_path / "cache")
    for name in ("snapshot_download", "list_repo_files"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


SMALL = {"config.json", "generation_config.json"}


def test_a_single_file(one, monkeypatch, tmp_path):
    words = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    hub = published(one, monkeypatch, tmp_path, *words)
    model, _ = load("owner/name", tokenizer=False)
    assert model.config == sample("llama").config
    assert hub.fetched == SMALL | {SINGLE, *words}
    assert hub.revisions == [None, COMMIT], "all files are of one commit"
    assert checkpoint_directory("owner/name", "v1") == hub.folder
    assert hub.revisions[2:] == ["v1", COMMIT]


def test_shards_that_the_index_names(many, monkeypatch, tmp_path):
    stale = "model-00001-of-00009.safetensors"
    hub = published(many, monkeypatch, tmp_path, stale)
    load("owner/name", tokenizer=False)
    shards = set(json.loads((many / INDEX).read_text())["weight_map"].values())
    assert len(shards) > 1 and hub.fetched == SMALL | {INDEX, *shards}


def test_both_are_there(one, many, monkeypatch, tmp_path):
    for file in (SINGLE, "config.json"):
        shutil.copy(one / file, many / file)
    hub = published(many, monkeypatch, tmp_path)
    load("owner/name", tokenizer=False)
    assert hub.fetched == SMALL | {INDEX, SINGLE}


def test_an_adapter(tmp_path, monkeypatch):
    hub = published(
        tmp_path / "a", monkeypatch, tmp_path, "adapter_config.json", ADAPTER
    )
    assert checkpoint_directory("owner/name") == hub.folder
    assert hub.fetched == {"adapter_config.json", ADAPTER}


def test_an_index_cannot_ask_for_everything(many, monkeypatch, tmp_path):
    table = {"a": "*", "b": "../x", "c": 3, "d": "original/consolidated.safetensors"}
    (many / INDEX).write_text(json.dumps({"weight_map": table}))
    hub = published(many, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="shards must lie|is missing"):
        load("owner/name", tokenizer=False)
    assert hub.fetched == SMALL | {INDEX}


def test_no_weights_that_can_be_loaded(one, monkeypatch, tmp_path):
    (one / SINGLE).unlink()
    published(one, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="neither .*consolidated.safetensors.*Convert"):
        load("owner/name")


def test_offline_from_the_cache(one, many, monkeypatch, tmp_path):
    """The library itself, without a network: what its cache holds is enough."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, directory in (("one", one), ("many", many)):
        place = tmp_path / f"models--owner--{name}"
        shutil.copytree(directory, place / "snapshots" / COMMIT)
        (place / "refs").mkdir()
        (place / "refs/main").write_text(COMMIT)
        model, _ = load(f"owner/{name}", tokenizer=False)
        assert model.config == sample("llama").config
    with pytest.raises(ValueError, match="owner/missing.*could not be fetched"):
        load("owner/missing")
