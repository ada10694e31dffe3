"""Where `save` writes: a folder beside the places of its files, then the moves.

Everything is moved when it is complete: weights first, `config.json` last. What the
new files replace goes away between these: weights that the directory's index names, and
of a tokenizer that is replaced, every file of its own.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from kvjax.files import digest, read_json, write_json
from kvjax.inputs import TEMPLATES
from kvjax.messages import shown
from kvjax.models.hub import ADAPTER_CONFIG
from kvjax.models.shards import CONFIG, INDEX, placed
from kvjax.models.tokenizer import OWN_FILES
from kvjax.places import check_place, given_path, held

LOG = logging.getLogger("kvjax.models")

STAGING = ".saving-"
RECORD = "kvjax_saved.json"
"""In the folder of further chat templates: which of them `save` placed there."""


def check_target(directory: Any) -> pathlib.Path:
    """A place to save a model to, and to load it from. Nothing is changed.

    Raises:
        ValueError: it is no path, cannot be written to, or holds an adapter.
    """
    folder = given_path(directory)
    check_place(folder, "Save to another directory.")
    if os.path.lexists(folder / ADAPTER_CONFIG):
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}); `load` would refuse a "
            "whole model beside it. Save to another directory, or move the adapter "
            "(adapter_*) away first."
        )
    return folder


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder inside of `folder` for the files of the only save there."""
    with held(folder) as mine:
        if not mine:
            raise ValueError(
                f"another process is saving to {folder}. Wait for it, or save "
                "elsewhere."
            )
        for left in folder.glob(f"{STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def contents(folder: pathlib.Path) -> str:
    """One text for what the files of a folder hold, by their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return json.dumps({str(path.relative_to(folder)): digest(path) for path in files})


def clear(folder: pathlib.Path) -> None:
    """Take away what a failed save has placed where nothing was before."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def move(staging: pathlib.Path, folder: pathlib.Path, *, tokenizer: bool) -> None:
    """Everything to its place; see `save` for the order.

    Args:
        staging: the new files.
        folder: where they go.
        tokenizer: whether one is among them, which replaces that of the folder.
    """
    old, record = placed(folder), folder / TEMPLATES / RECORD
    templates = _recorded(record) if tokenizer else []
    fresh = sorted(staging.iterdir(), key=lambda path: (_rank(path.name), path.name))
    for path in fresh:
        _check_free(folder / path.name, path.is_dir())
        _on_disk(path)
    names = {path.name for path in fresh}
    weights = [path for path in fresh if _rank(path.name) == 0]
    for path in weights:
        os.replace(path, folder / path.name)
    for path in old:
        if path.name not in names:
            path.unlink(missing_ok=True)
    if tokenizer:
        for name in OWN_FILES:
            if name not in names and (folder / name).is_file():
                (folder / name).unlink()
        _move_templates(staging / TEMPLATES, record, templates)
    for path in fresh[len(weights) :]:
        if path.name == TEMPLATES:
            continue
        if path.is_dir():  # what other libraries' tokenizers write
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            os.replace(path, folder / path.name)


def _move_templates(
    staging: pathlib.Path, record: pathlib.Path, old: list[str]
) -> None:
    """Further chat templates: those that a save placed are replaced, others stay.

    The record names them before they are there, so that a kill leaves none unnamed.
    """
    folder = record.parent
    fresh = sorted(path.name for path in staging.glob("*"))
    if fresh:
        folder.mkdir(exist_ok=True)
    if fresh or old:
        write_json(record, {"templates": sorted({*old, *fresh})})
    for name in fresh:
        os.replace(staging / name, folder / name)
    for name in old:
        if name not in fresh:
            (folder / name).unlink(missing_ok=True)
    if fresh:
        write_json(record, {"templates": fresh})
    elif old:
        record.unlink()
        with contextlib.suppress(OSError):  # somebody else's are in it
            folder.rmdir()
    others = {path.name for path in folder.glob("*.jinja")} - {*fresh}
    if others:
        LOG.warning(
            "%s holds chat templates that no save placed there: %s. They are kept, and "
            "loaded with the tokenizer that is saved now; remove them if they are not "
            "its own.",
            folder,
            shown(sorted(others)),
        )


def _recorded(record: pathlib.Path) -> list[str]:
    """Plain names alone: what stands there is removed."""
    if not record.is_file():
        return []
    found = read_json(record).get("templates")
    names = found if isinstance(found, list) else []
    return [
        name
        for name in names
        if isinstance(name, str)
        and name.endswith(".jinja")
        and pathlib.PurePath(name).name == name
    ]


def _rank(name: str) -> int:
    """Weights and what names them, what goes with them, and the config."""
    if name.endswith(".safetensors") or name == INDEX:
        return 0
    return 2 if name == CONFIG else 1


def _check_free(path: pathlib.Path, folder: bool) -> None:
    """Before anything is moved: nothing of another kind is in the place."""
    if os.path.lexists(path) and path.is_dir() != folder:
        what, wanted = (
            ("a file", "a directory") if folder else ("a directory", "a file")
        )
        raise ValueError(
            f"{path} is {what}; `save` writes {wanted} there. Move it away, or save to "
            "another directory."
        )


def _on_disk(path: pathlib.Path) -> None:
    for file in (path, *path.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
