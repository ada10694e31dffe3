"""Parses the command line, runs one command, turns errors into exit codes."""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TextIO

import tyro
from rich.console import Console

from kvjax.cli.base import CLOSED_OUTPUT, UI, Command
from kvjax.cli.bench import Bench
from kvjax.cli.calibrate import Calibrate
from kvjax.cli.convert import Convert
from kvjax.cli.demo import Demo
from kvjax.cli.evaluate import Eval
from kvjax.cli.fetch import Fetch
from kvjax.cli.finetune import Finetune
from kvjax.cli.generate import Generate
from kvjax.cli.lm_eval import LmEval
from kvjax.cli.plan import PlanCommand
from kvjax.cli.report import Report
from kvjax.files import is_full
from kvjax.messages import nearest, shown
from kvjax.narrow import narrow

COMMANDS: Mapping[str, type[Command]] = MappingProxyType(
    {
        "demo": Demo,
        "eval": Eval,
        "lm-eval": LmEval,
        "finetune": Finetune,
        "generate": Generate,
        "report": Report,
        "plan": PlanCommand,
        "bench": Bench,
        "calibrate": Calibrate,
        "convert": Convert,
        "fetch": Fetch,
    }
)

WRONG, INTERRUPTED, CLOSED = 2, 130, 141

_FULL = r"RESOURCE_EXHAUSTED|[Oo]ut of memory"
_NO_BACKEND = r"(Unable to initialize|Unknown) backend|No visible .* devices?"
"""In what JAX says where there is no memory or no device."""


def overview() -> str:
    """What `kvjax --help` prints."""
    lines = [f"  {name:9}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: kvjax COMMAND [options]\n\n"
        "Research on the KV cache of long-context language models, in JAX.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "examples:\n"
        "  kvjax demo\n"
        "  kvjax eval --compression snapkv,h2o --keep 0.5,0.25 --tasks recall\n"
        "  kvjax COMMAND --help      every option of a command, and all compressions\n"
        "\n"
        "Compiled programs and fetched models are kept in KVJAX_CACHE_DIR (default:\n"
        "kvjax in the user's cache folder). --version prints the version."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kvjax` with these arguments; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding does not have is written in another way.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        _forget(sys.stdout, sys.stderr)
        return CLOSED
    except OSError as wrong:
        _forget(sys.stdout)
        _complain(f"the output could not be written: {wrong.strerror}.")
        return WRONG
    return code


def _forget(*streams: TextIO | None) -> None:
    """Nothing more is written there: Python would complain when it ends."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore


def _main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else WRONG
    if words[0] in ("-V", "--version"):
        print(f"kvjax {importlib.metadata.version('kvjax')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        _complain(
            f"unknown command {shown(name)}; expected one of {[*COMMANDS]}.{hint}"
        )
        return WRONG
    try:
        command = parse(name, rest)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else WRONG
    except ValueError as wrong:
        _complain(str(wrong))
        return WRONG
    return execute(command)


def parse(name: str, words: Sequence[str]) -> Command:
    """A command from its name and the words behind it.

    Raises:
        SystemExit: help was asked for, or an option is wrong; tyro has said what.
        ValueError: see `dotted` and `Command.check`.
    """
    with _cut():
        command = tyro.cli(
            COMMANDS[name],
            prog=f"kvjax {name}",
            description=COMMANDS[name].description(),
            args=dotted(name, words),
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
    command.check()
    return command


@contextlib.contextmanager
def _cut() -> Iterator[None]:
    """What tyro says of mistakes, cut: it repeats all words, however long they are."""
    said = _Said(sys.stderr is not None and sys.stderr.isatty())
    try:
        with contextlib.redirect_stderr(said):
            yield
    finally:
        if text := said.getvalue():
            print(shortened(text), end="", file=sys.stderr)


class _Said(io.StringIO):
    """Text for a terminal, or not."""

    def __init__(self, terminal: bool):
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def shortened(text: str) -> str:
    """The beginning and the end of a long message."""
    return text if len(text) <= 3000 else f"{text[:2000]} ... {text[-900:]}"


def dotted(name: str, words: Sequence[str]) -> list[str]:
    """`--compression.a.b VALUE` and `--compression.a.b=VALUE` as assignments."""
    option = "--compression-set" if name == "eval" else "--set"
    out, left = [], list(words)
    while left:
        word = left.pop(0)
        path = word.removeprefix("--compression.")
        if path == word:
            out.append(word)
        elif "=" in path:
            out += [option, path]
        elif left and not left[0].startswith("--"):
            out += [option, f"{path}={left.pop(0)}"]
        else:
            raise ValueError(f"{word} needs a value.")
    return out


@narrow
def execute(command: Command) -> int:
    """Run a parsed command; returns the exit code."""
    # Nobody here needs PyTorch: keep the tokenizers' library from saying so.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # A path or a model's words may look like markup, which nothing here uses.
    forced = command.output.progress or None
    err = Console(stderr=True, force_terminal=forced, markup=False)
    bars = command.output.progress or (err.is_terminal and not command.output.json)
    ui = UI(err=err, json=command.output.json, bars=bars)
    try:
        if command.output.json and sys.stdout is None:
            raise ValueError(f"--json: {CLOSED_OUTPUT}")
        with contextlib.ExitStack() as stack:
            if command.output.json:  # a library that prints must not spoil the JSON
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            result = command.run(ui)
        if command.output.json:
            print(json.dumps(result, allow_nan=False))
        else:
            command.show(result, Console(markup=False))
    except KeyboardInterrupt:
        kept = "What is finished is kept; the same command goes on."
        if not command.resumes:
            kept = "Nothing is kept to go on from; the same command begins anew."
        _complain(f"interrupted. {kept}")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError, RuntimeError) as wrong:
        said = explained(wrong)
        if said is None:
            raise
        if command.output.debug:
            traceback.print_exc()
        _complain(said)
        return WRONG
    return command.code(result)


def explained(wrong: Exception) -> str | None:
    """What to say of an exception; None of a fault of this package.

    JAX raises RuntimeError where a device or its memory is missing.
    """
    text = str(wrong)
    if isinstance(wrong, OSError) and is_full(wrong):
        return f"{text}. Free some space, or write elsewhere."
    line = text.strip().partition("\n")[0][:300]
    if isinstance(wrong, MemoryError) or (
        isinstance(wrong, RuntimeError) and re.search(_FULL, text)
    ):
        return (
            f"there is not enough memory for that{f' ({line})' if line else ''}. Lower "
            "the sizes: shorter prompts (--length, `lengths`), a smaller batch, "
            "smaller windows or `residual`."
        )
    if isinstance(wrong, RuntimeError):
        if not re.search(_NO_BACKEND, text):
            return None
        given = os.environ.get("JAX_PLATFORMS")
        unset = (
            f"Leave JAX_PLATFORMS (here {shown(given)}) unset, or i" if given else "I"
        )
        return (
            f"JAX finds no device to run on ({line}). {unset}nstall JAX for the device "
            "that is meant."
        )
    return text


def _complain(text: str) -> None:
    try:
        print(f"kvjax: {shortened(text)}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody listens
        _forget(sys.stderr)
