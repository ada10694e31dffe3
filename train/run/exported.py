"""What a run exports, `RUN/model` and `RUN/adapter`: replaced only if it wrote them.

`RUN/exported.json` says what the run wrote there: the digest of each file. It is
written before them, without digests, and again behind them, so that a killed export is
known to be one. They are this run's if the run has checkpoints and every file is one
that `exported.json` has, with the same contents.
"""

import pathlib
from collections.abc import Mapping

from kvjax.files import read_json, write_json
from kvjax.inputs import of_files
from kvjax.messages import shown

MODEL, ADAPTER = EXPORTED = "model", "adapter"
MARK = "exported.json"
WHOLE, FILES = "whole", "files"


def check_exported(directory: pathlib.Path, resumes: bool) -> None:
    """What lies where a run exports may be replaced.

    Raises:
        ValueError: it is not what this run wrote.
    """
    mark = directory / MARK
    for name in EXPORTED:
        _check(directory / name, mark, resumes)


def _check(path: pathlib.Path, mark: pathlib.Path, resumes: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise _foreign(path, "it is no directory")
    files = _files_of(path)
    if not files:
        return
    if not resumes or not mark.is_file():
        lacks = f"there is no {MARK}" if resumes else "there are no checkpoints of one"
        raise _foreign(path, f"no run is known to have written it ({lacks})")
    whole, known = _marked(mark)
    if not whole:  # killed while it was written
        return
    for name, file in files.items():
        then = known.get(name, "")
        now = of_files({name: file}, known)[name]
        if then.split(" ")[0] != now.split(" ")[0]:
            inside = file.relative_to(path).as_posix()
            what = "has changed since" if then else "is not of this run"
            raise _foreign(path, f"{inside} {what}")


def begin_export(directory: pathlib.Path) -> None:
    """From now on what a run exports to is this run's, whatever becomes of it."""
    write_json(directory / MARK, {WHOLE: False, FILES: {}})


def end_export(directory: pathlib.Path) -> None:
    """All that the run exports is complete."""
    files: dict[str, pathlib.Path] = {}
    for name in EXPORTED:
        files |= _files_of(directory / name)
    write_json(directory / MARK, {WHOLE: True, FILES: of_files(files, {})})


def _files_of(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files below a directory of a run, by their paths in the run."""
    found = sorted(file for file in path.rglob("*") if not file.is_dir())
    return {file.relative_to(path.parent).as_posix(): file for file in found}


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
