"""`kvjax finetune`."""

import contextlib
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, final

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvjax.cli.base import (
    UI,
    Assignments,
    Command,
    Flag,
    Folder,
    Output,
    compile_cache,
    optional,
)
from kvjax.cli.tables import print_dry_run
from kvjax.fields import Range
from kvjax.pallas_kernels.targets import TARGETS
from kvjax.train.recipe import bundled_recipes, load_config

RECIPES = f"A bundled recipe ({', '.join(bundled_recipes())}) or a YAML file."
DEVICES = f"With --dry-run: {', '.join(TARGETS)}."


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(Command):
    """Train a model under the compressions that it shall tolerate."""

    resumes: ClassVar[bool] = True
    summary: ClassVar[str] = "Train a model, plain or under simulated compression."
    presets: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax finetune --config tolerant\n"
        "  kvjax finetune --config mine.yaml --set optimizer.learning_rate=0.0005\n"
        "\n"
        "Checkpoints and log.jsonl go to OUT, the finished model to OUT/model. A run\n"
        "that was interrupted goes on when the same command is given again; Ctrl-C\n"
        "saves it first. --set resume=STEP goes back to an earlier checkpoint.\n"
        "\n"
        "  kvjax finetune --config lora_llama3_8b --dry-run --device v6e --chips 8\n"
        "\n"
        "compiles the steps for chips that are not here and prints what they need."
    )

    config: Annotated[str, tyro.conf.arg(metavar="NAME|FILE", help=RECIPES)]
    set: Assignments = ()
    """A field of the recipe, as in --set seed=1; repeatable."""
    out: Folder = None
    """Directory of the run; default: runs/NAME-SEED."""
    distributed: Flag = False
    """One of several processes of a run, found by jax.distributed."""
    dry_run: Flag = False
    """Only compile, for DEVICE; print memory and operations."""
    device: Annotated[str | None, optional("TEXT", DEVICES)] = None
    chips: Annotated[int | None, Range(1, 2**16), optional("N")] = None
    """With --dry-run: chips of the slice; 1 if left out."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        from kvjax.train.run import run
        from kvjax.train.run.processes import join

        config = load_config(self.config, self.set)
        if self.dry_run or self.device is not None or self.chips is not None:
            return self._compiled(config, ui)
        compile_cache()
        if self.distributed:
            join()
        name = f"{pathlib.Path(self.config).stem}-{config.seed}"
        out = self.out or pathlib.Path("runs") / name
        with quiet(not self.output.debug), bar(ui, config.steps) as progress:
            state = run(config, out, progress=progress)
        return {"out": str(out), "model": str(out / "model"), "steps": int(state.step)}

    def _compiled(self, config: Any, ui: UI) -> Mapping[str, Any]:
        from kvjax.train.run.dry_run import dry_run

        if not self.dry_run or self.device is None or self.distributed:
            raise ValueError(
                "--dry-run and --device need one another, --chips needs both, and they "
                "exclude --distributed. "
                "Say --dry-run --device v5e --chips 8."
            )
        with ui.status("compiling") as told:
            return dry_run(config, self.device, self.chips or 1, told)

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        if "rows" in result:
            print_dry_run(console, result)
            return
        print(f"{result['steps']} steps; the model is in {result['model']}")


@contextlib.contextmanager
def bar(ui: UI, steps: int) -> Iterator[Callable[[Any], None]]:
    """A progress bar below the lines of the log, where stderr is a terminal."""
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ui.err, disable=not ui.bars) as shown:
        task = shown.add_task("starting", total=steps)

        def tell(done: Any) -> None:
            loss = "training" if done.loss is None else f"loss {done.loss:.3f}"
            shown.update(task, completed=done.step, description=loss)

        yield tell


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Without the tracebacks that orbax logs of what it raises as well."""
    if wanted:
        _quiet_threads()
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers if wanted else ():
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _quiet_threads() -> None:
    """From now on: nothing of threads that tell a loop which orbax has closed."""
    said = sys.unraisablehook

    def say(what: "sys.UnraisableHookArgs") -> None:
        if str(what.exc_value) != "Event loop is closed":
            said(what)

    sys.unraisablehook = say
