"""What a run exports, `RUN/model` and `RUN/adapter`: replaced only if it wrote them.

`RUN/exported.json` says what the run wrote there: the digest of each file. It is
written before the model, without digests, and again behind it, so that a killed export
is known to be one. A model is this run's if the run has checkpoints and every file of
the model is one that `exported.json` has, with the same contents.
"""

import os
import pathlib
from collections.abc import Mapping

from kvjax.files import read_json, write_json
from kvjax.inputs import of_files
from kvjax.messages import shown

ADAPTER = "adapter"
MARK = "exported.json"
WHOLE, FILES = "whole", "files"


def check_model(directory: pathlib.Path, resumes: bool) -> None:
    """What `directory / "model"` holds may be replaced, and `directory / "adapter"`.

    Raises:
        ValueError: it is not what this run wrote.
    """
    model, mark = directory / "model", directory / MARK
    adapter = directory / ADAPTER
    if os.path.lexists(adapter) and not (resumes and mark.is_file()):
        raise _foreign(adapter, "no run is known to have written it")
    if not model.exists() and not model.is_symlink():
        return
    if not model.is_dir():
        raise _foreign(model, "it is no directory")
    files = files_of(model)
    if not files:
        return
    if not resumes or not mark.is_file():
        lacks = f"there is no {MARK}" if resumes else "there are no checkpoints of one"
        raise _foreign(model, f"no run is known to have written it ({lacks})")
    whole, known = _marked(mark)
    if not whole:  # killed while it was written
        return
    for name, file in files.items():
        then = known.get(name, "")
        now = of_files({name: file}, known)[name]
        if then.split(" ")[0] != now.split(" ")[0]:
            what = "has changed since" if then else "is not of this run"
            raise _foreign(model, f"{name} {what}")


def begin_export(directory: pathlib.Path) -> None:
    """From now on `directory / "model"` is this run's, whatever becomes of it."""
    write_json(directory / MARK, {WHOLE: False, FILES: {}})


def end_export(directory: pathlib.Path) -> None:
    """`directory / "model"` is complete."""
    files = of_files(files_of(directory / "model"), {})
    write_json(directory / MARK, {WHOLE: True, FILES: files})


def files_of(model: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files below a directory, by their paths in it."""
    found = sorted(path for path in model.rglob("*") if not path.is_dir())
    return {path.relative_to(model).as_posix(): path for path in found}


def _marked(mark: pathlib.Path) -> tuple[bool, Mapping[str, str]]:
    tree = read_json(mark)
    whole, files = tree.get(WHOLE), tree.get(FILES)
    if (
        not isinstance(whole, bool)
        or not isinstance(files, dict)
        or not all(isinstance(digest, str) for digest in files.values())
    ):
        raise ValueError(
            f"{mark} is not what a run writes: {shown(tree)}. Move {mark.parent}/model "
            "away and remove it; the run writes both again."
        )
    return whole, files


def _foreign(model: pathlib.Path, why: str) -> ValueError:
    return ValueError(
        f"{model} would be overwritten by what a run exports: {why}. Move it away, or "
        "give another directory with --out."
    )
