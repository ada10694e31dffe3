"""Where the numbers of a run go: terminal, JSON lines, TensorBoard, a tracker."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from kvjax.train.recipe import LogConfig, TrainConfig
from kvjax.train.run import processes
from kvjax.train.run.directory import replace_text
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


def _drop_after(path: pathlib.Path, step: int, checkpoints: pathlib.Path) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:  # the line that a killed process was writing
            continue
        if line.endswith("\n") and event["step"] <= step:
            kept.append(line)
    with writing("the log", path, checkpoints):
        replace_text(path, "".join(kept))
