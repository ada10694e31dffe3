"""Where the numbers of a run go: terminal, JSON lines, TensorBoard, a tracker."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from kvjax.files import parse_json, regular, write_text
from kvjax.messages import shown
from kvjax.plaintext import decoded
from kvjax.train.recipe import LogConfig, TrainConfig
from kvjax.train.run import processes
from kvjax.train.run.stored import unwritten, writing

GROUPS = ("held_out", "cached")
"""Events of a name of their own; all others are of a training step."""


class Writer(Protocol):
    """What takes scalars by name, beside the file."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class TensorBoard:
    """Event files, by tensorboardX.

    Args:
        directory: for the files.
        first: the step that the run goes on from; later ones are overwritten.
    """

    def __init__(self, directory: pathlib.Path, first: int):
        library = importlib.import_module("tensorboardX")
        self.writer = library.SummaryWriter(str(directory), purge_step=first + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.write`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Writer.close`."""
        self.writer.close()


class Tracker:
    """trackio or wandb, which have one interface.

    Args:
        config: names the library and the project.
        name: of the run, under which it goes on.
        recipe: of the run.
    """

    def __init__(self, config: LogConfig, name: str, recipe: Mapping[str, Any]):
        assert config.tracker is not None
        self.library = importlib.import_module(config.tracker)
        same = {"id": name} if config.tracker == "wandb" else {}
        self.library.init(
            project=config.project,
            name=name,
            config=dict(recipe),
            resume="allow",
            **same,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.write`."""
        self.library.log(dict(values), step=step)

    def close(self) -> None:
        """See `Writer.close`."""
        self.library.finish()


def check_writers(config: LogConfig) -> None:
    """What a recipe logs to is installed.

    Raises:
        ValueError: it is not; says what to install.
    """
    wanted = {
        "tensorboardX": ("log.tensorboard", "tensorboard", config.tensorboard),
        "trackio": ("log.tracker", "trackio", config.tracker == "trackio"),
        "wandb": ("log.tracker", "wandb", config.tracker == "wandb"),
    }
    for library, (field, extra, asked) in wanted.items():
        if asked and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"`{field}` needs {library}, which is not installed: "
                f"pip install 'kvjax[{extra}]', or leave the field out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """A JSON line per event in a file, a short one on the terminal, and scalars.

    Attributes:
        path: the file; None: nothing is said, since another process does.
        writers: what takes the scalars.
    """

    path: pathlib.Path | None
    writers: tuple[Writer, ...] = ()

    def __call__(self, *, step: int, **event: Any) -> None:
        """Write one event; numbers go to the file as they are."""
        if self.path is None:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **event}) + "\n")
        except OSError as wrong:
            raise _LineLost(str(wrong)) from wrong
        rounded = {
            k: round(v, 5) if isinstance(v, float) else v for k, v in event.items()
        }
        print("  ".join(f"{k} {v}" for k, v in {"step": step, **rounded}.items()))
        named = [f"{group}/{event[group]}" for group in GROUPS if group in event]
        prefix = named[0] if named else "train"
        values = {
            f"{prefix}/{k}": float(v)
            for k, v in event.items()
            if isinstance(v, float | int)
        }
        for writer in self.writers:
            writer.write(step, values)


class _LineLost(OSError):
    """A line that could not be written; not an error of the terminal or a writer."""


@contextlib.contextmanager
def opened(directory: pathlib.Path, config: TrainConfig, first: int) -> Iterator[Log]:
    """The log of a run that goes on behind step `first`.

    Lines of later steps are dropped: a run that was killed behind its last checkpoint
    does these steps again. Of several processes the first one speaks.

    Raises:
        OSError: a line could not be written; what is kept is named.
    """
    if not processes.first():
        yield Log(path=None)
        return
    path, checkpoints = directory / "log.jsonl", directory / "checkpoints"
    _drop_after(path, first, checkpoints)
    writers: list[Writer] = []
    if config.log.tensorboard:
        writers.append(TensorBoard(directory / "tensorboard", first))
    if config.log.tracker is not None:
        recipe = dataclasses.asdict(config)
        writers.append(Tracker(config.log, directory.name, recipe))
    try:
        yield Log(path=path, writers=tuple(writers))
    except _LineLost as wrong:  # what was being saved is complete by now, or failed
        raise unwritten("a line of the log", path, wrong, checkpoints) from wrong
    finally:
        for writer in writers:
            writer.close()


def check_log(directory: pathlib.Path) -> None:
    """The log of a run that goes on can be read, or a `ValueError` names the line."""
    if processes.first():
        _lines(directory / "log.jsonl")


def _drop_after(path: pathlib.Path, step: int, checkpoints: pathlib.Path) -> None:
    if not path.exists():
        return
    kept = [line for found, line in _lines(path) if found <= step]
    with writing("the log", path, checkpoints):
        write_text(path, "".join(kept))


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """The lines of a log and their steps, without what a killed process left.

    Raises:
        ValueError: a line is not what a run writes.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(regular(path).read_bytes().split(b"\n")[:-1], 1):
        where = f"line {number} of {path}"
        try:
            text = decoded(line, where)
            event = parse_json(text, where)
            step = event.get("step") if isinstance(event, dict) else None
            if not isinstance(step, int) or isinstance(step, bool):
                raise ValueError(f"{where} is no event of a step: {shown(event)}.")
        except ValueError as wrong:
            raise ValueError(
                f"{wrong} The log is damaged: remove the line, or move the file away; "
                "the run goes on without it."
            ) from None
        found.append((step, f"{text}\n"))
    return found
