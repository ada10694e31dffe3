"""What all commands share: options, output, models, where compiled programs go."""

import abc
import contextlib
import dataclasses
import math
import os
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from kvjax.compress import compression, compressions
from kvjax.compress.config import Compression
from kvjax.compress.presets import describe
from kvjax.config import parse_assignments
from kvjax.fields import Range, fit, hints_of
from kvjax.messages import shown
from kvjax.models.bundled import bundled_models, model_directory, small_models
from kvjax.models.published import PUBLISHED
from kvjax.places import cache_folder


def optional(metavar: str, text: str | None = None) -> Any:
    """An option that may be left out: no `{None}|STR`, no `(default: None)`.

    `text` is its help where that is no literal, which a docstring would be.
    """
    return tyro.conf.arg(metavar=metavar, help=text, help_behavior_hint="")


MODELS = (
    "Checkpoint directory, GGUF file, hub id (owner/name), or a bundled model: "
    f"{', '.join(bundled_models())}. Or one that `kvjax fetch` has fetched: "
    f"{', '.join(PUBLISHED)}."
)
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Assignments = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PATH=VALUE")
]
Model = Annotated[str, tyro.conf.arg(metavar="DIR|ID", help=MODELS)]
Dtype = Annotated[Literal["auto", "bfloat16", "float16", "float32"], tyro.conf.arg()]
Text = Annotated[str | None, optional("TEXT")]
Names = Annotated[str | None, optional("A,B,C")]
Mesh = Annotated[str | None, optional("AXIS=N,AXIS=N")]
MOST = 2**31 - 1
"""Of what is counted."""
Count = Annotated[int | None, Range(1, MOST), optional("N")]
Items = Annotated[int | None, Range(1, 10**6), optional("N")]
Seed = Annotated[int | None, Range(0, 2**32 - 1), optional("N")]
Fraction = Annotated[float | None, Range(above=0, most=1), optional("FRACTION")]
File = Annotated[pathlib.Path | None, optional("FILE")]
Folder = Annotated[pathlib.Path | None, optional("DIR")]
OptionalModel = Annotated[str | None, optional("DIR|ID", MODELS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What is printed."""

    json: Flag = False
    """Print the result as JSON on stdout, and nothing else there."""
    progress: Flag = False
    """Show progress on stderr even where it is not a terminal."""
    debug: Flag = False
    """Show the traceback of an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(abc.ABC):
    """One subcommand; its fields are its options."""

    summary: ClassVar[str]
    examples: ClassVar[str]
    presets: ClassVar[bool] = True
    resumes: ClassVar[bool]
    """Whether an interrupted call leaves something that the same call goes on with."""
    output: Output

    def check(self) -> None:
        """Options are what their annotations say, or a `ValueError` names one."""
        for name, hint in hints_of(type(self)).items():
            if not _is_choice(hint):  # which the parser has looked at
                fit(getattr(self, name), hint, option(name))

    @abc.abstractmethod
    def run(self, ui: "UI") -> Mapping[str, Any]:
        """Do it; the result is what `--json` prints."""

    @abc.abstractmethod
    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """Print the result for people."""

    def code(self, result: Mapping[str, Any]) -> int:
        """Exit code of what `run` has returned."""
        del result
        return 0

    @classmethod
    def description(cls) -> str:
        """Text at the head of `--help`."""
        parts = [cls.summary, "examples:\n" + cls.examples.rstrip()]
        if cls.presets:
            wide = max(map(len, compressions()))
            lines = [f"  {n:{wide}}  {headline(n)}" for n in compressions()]
            parts.append("compressions:\n" + "\n".join(lines))
        return "\n\n".join(parts)


def _is_choice(hint: Any) -> bool:
    """Whether one of some words is meant, perhaps or nothing."""
    return typing.get_origin(hint) is Literal or any(
        map(_is_choice, typing.get_args(hint))
    )


def option(name: str) -> str:
    """A field as the command line has it."""
    return "--" + name.replace("_", "-")


def headline(name: str) -> str:
    """The first line of a preset's description."""
    return describe(name).partition("\n")[0]


@dataclasses.dataclass(frozen=True)
class UI:
    """Where a command may write while it runs."""

    err: Console
    json: bool
    bars: bool

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """A line that is there while something goes on; what is given changes it."""
        if not self.bars:
            yield lambda _: None
            return
        # A path may look like markup, which a status reads whatever its console does.
        with self.err.status(escape(text)) as line:
            yield lambda text: line.update(escape(text))


CLOSED_OUTPUT = (
    "standard output is closed, and the result goes nowhere else. Send it to a file, a "
    "pipe or a terminal."
)


def load_model(
    name: str, dtype: str, ui: UI, mesh: str | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer, with compiled programs cached on disk."""
    from kvjax.models.io import load

    compile_cache()
    if name.startswith("~") and os.path.expanduser(name) == name:
        raise ValueError(f"--model {shown(name)}: no such home directory.")
    path = model_directory(name)
    if dtype == "auto":
        dtype = "float32" if name in small_models() else "bfloat16"
    spread = None if mesh is None else _devices(mesh)
    with ui.status(f"loading {name}"):
        return load(path, dtype, mesh=spread)


def _devices(text: str) -> Any:
    """The mesh that `--mesh` asks for, of the devices that there are.

    Raises:
        ValueError: there are too few, or an axis of another name.
    """
    import jax

    from kvjax.models.sharding import RULES

    sizes = mesh_of(text)
    known = {axis for axis in RULES.values() if axis is not None}
    if other := [name for name in sizes if name not in known]:
        raise ValueError(
            f"--mesh {shown(text)}: there is no axis {shown(other[0])}; expected some "
            f"of {sorted(map(str, known))}."
        )
    count, there = math.prod(sizes.values()), jax.device_count()
    if not 1 <= count <= there:
        raise ValueError(
            f"--mesh {shown(text)} asks for {count} devices; there are {there}. The "
            "product of the sizes must be at most that, and at least 1."
        )
    devices = jax.devices()[:count]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)


def compile_cache() -> None:
    """Keep compiled programs between runs; JAX creates the folder when it writes.

    `JAX_COMPILATION_CACHE_DIR` wins, then `KVJAX_CACHE_DIR`, then the user's cache.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder()
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pick(name: str, keep: float | None, assignments: tuple[str, ...]) -> Compression:
    """A compression from what the command line says of it."""
    c = compression(name, **parse_assignments(assignments))
    return c if keep is None else c.with_keep(keep)


def split(text: str) -> tuple[str, ...]:
    """`a,b, c` as its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """`0.5,0.25` as numbers.

    Raises:
        ValueError: names the option.
    """
    try:
        return tuple(kind(part) for part in split(text))
    except ValueError:
        raise ValueError(
            f"{name} needs numbers with commas between; got {shown(text)}."
        ) from None


def mesh_of(text: str) -> dict[str, int]:
    """`data=2,model=4` as sizes by axis.

    Raises:
        ValueError: it is none.
    """
    pairs = [part.partition("=") for part in split(text)]
    sizes = {name: size for name, _, size in pairs}
    whole = all(size.isdecimal() and len(size) < 8 for size in sizes.values())
    if not pairs or not whole or len(sizes) < len(pairs):
        raise ValueError(
            f"--mesh {shown(text)}: expected sizes by axis, as in data=2,model=4."
        )
    return {name: int(size) for name, size in sizes.items()}
