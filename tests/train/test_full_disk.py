"""A full disk: what is said of it, and that the same command goes on afterwards."""

import errno
import os
import pathlib
import resource
import time
from typing import Any

import pytest

from kvjax.cli.main import main
from kvjax.models.io import load
from kvjax.train.run import run
from kvjax.train.run.progress import StepProgress
from kvjax.train.run.stored import steps_in
from tests.train.test_checkpoints import damaging
from tests.train.tiny_run import recipe
from tests.train.whole_run import copied, goes_on

REMEDY = "Free some space and give the same command again."


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Half:
    """A file that takes half of what it is given, and then there is no space left."""

    def __init__(self, file: Any):
        self.file = file

    def __enter__(self) -> "Half":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.file.write(data[: len(data) // 2])
        raise no_space()


def fill(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on, files of this name find no space."""
    plain = pathlib.Path.open

    def opened(self: pathlib.Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = plain(self, mode, *args, **kwargs)
        return Half(file) if self.name == name and "r" not in mode else file

    monkeypatch.setattr(pathlib.Path, "open", opened)


@damaging
def test_under_a_checkpoint(whole, tmp_path, monkeypatch):
    part, plain = copied(whole, tmp_path, last=4), os.rename

    def rename(source: Any, target: Any, **kwargs: Any) -> None:
        if str(target).endswith("step_6"):
            raise no_space()
        plain(source, target, **kwargs)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="a checkpoint could not be written") as said:
        run(recipe(), part)
    monkeypatch.undo()
    for words in (f"{part}/checkpoints", "No space left", "kept: step_4.", REMEDY):
        assert words in str(said.value)
    assert steps_in(part / "checkpoints") == [4]
    goes_on(whole, part)


def test_under_a_line_of_the_log(whole, tmp_path, monkeypatch):
    """What is being saved by then becomes complete, and is named."""
    part = copied(whole, tmp_path, last=4)

    def told(progress: StepProgress) -> None:
        if progress.step == 6:
            fill(monkeypatch, "log.jsonl")

    with pytest.raises(OSError, match="a line of the log could not be") as said:
        run(recipe(save_every=1), part, progress=told)
    monkeypatch.undo()
    for words in (f"{part}/log.jsonl", "No space left", "step_4, step_5.", REMEDY):
        assert words in str(said.value)
    assert not (part / "log.jsonl").read_text().endswith("\n")
    goes_on(whole, part)


@pytest.mark.parametrize(
    ("name", "what"),
    [("log.jsonl", "the log"), ("recipe.yaml", "the recipe")],
)
def test_before_the_first_step(name, what, whole, tmp_path, monkeypatch):
    part = copied(whole, tmp_path, last=4)
    before = (part / name).read_bytes()
    fill(monkeypatch, f".{name}.{os.getpid()}.tmp")
    with pytest.raises(OSError, match=f"{what} could not be written") as said:
        run(recipe(), part)
    for words in (f"{part}/{name}", "No space left", "step_4.", REMEDY):
        assert words in str(said.value)
    assert (part / name).read_bytes() == before


def test_under_the_finished_model(whole, tmp_path, monkeypatch, capsys):
    """An earlier one stays whole; no training is needed to write it again."""
    part = copied(whole, tmp_path)
    model, files = part / "model", sorted((part / "model").iterdir())
    before = [path.read_bytes() for path in files]
    config = ["--config", str(part / "recipe.yaml"), "--out", str(part)]
    fill(monkeypatch, "model.safetensors")
    assert main(["finetune", *config]) == 2
    monkeypatch.undo()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"kvjax: the model could not be written to {model} ")
    for words in ("No space left", "kept: step_4, step_6.", REMEDY):
        assert words in said
    assert sorted(model.iterdir()) == files
    assert [path.read_bytes() for path in files] == before
    (model / "model.safetensors").unlink()
    goes_on(whole, part)
    assert [path.read_bytes() for path in files] == before


def test_under_the_tokenizer(whole, tmp_path, monkeypatch):
    """Its library says so in words alone."""
    from kvjax.train.data import tokenizer

    part = copied(whole, tmp_path)

    def refuse(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_tokenizer", refuse)
    with pytest.raises(OSError, match="the model could not .*kept: step_4, step_6"):
        run(recipe(), part)
    monkeypatch.undo()
    goes_on(whole, part)
    load(part / "model")


@damaging
def test_a_file_that_may_grow_no_longer(whole, tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def told(progress: StepProgress) -> None:
        if progress.step == 3:  # the kernel refuses longer files
            while not steps_in(tmp_path / "checkpoints"):
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))

    try:
        with pytest.raises(OSError, match="are kept: step_2. Fix that"):
            run(recipe(), tmp_path, progress=told)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert steps_in(tmp_path / "checkpoints") == [2]
    goes_on(whole, tmp_path)
