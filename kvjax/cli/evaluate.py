"""`kvjax eval`."""

import dataclasses
import pathlib
import signal
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, final

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from kvjax.cli.base import (
    UI,
    Assignments,
    Command,
    Dtype,
    Flag,
    Folder,
    Items,
    Mesh,
    Names,
    OptionalModel,
    Output,
    Seed,
    load_model,
    numbers,
    option,
    optional,
    split,
)
from kvjax.cli.tables import print_scores
from kvjax.config import parse_assignments
from kvjax.eval.config import (
    NEEDLE,
    EvalConfig,
    TaskEntry,
    bundled_evaluations,
    load_config,
)
from kvjax.eval.methods import RANDOM, label_of
from kvjax.eval.suites import suite, suites, with_fields
from kvjax.eval.tasks import TASKS
from kvjax.interrupt import noted_interrupt
from kvjax.messages import shown
from kvjax.models.bundled import DEFAULT, model_directory
from kvjax.places import expanded

CONFIGS = (
    f"A bundled evaluation ({', '.join(bundled_evaluations())}) or a YAML file; the "
    "options below change it. If left out: demo, and words with --suite."
)
TASK_NAMES = f"Of {', '.join([*TASKS, NEEDLE])}."
SUITE_NAMES = f"Ask the tasks of a benchmark: {', '.join(suites())}."
_BUDGET = "evict.budget.keep"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Score compressions on tasks with known answers."""

    resumes: ClassVar[bool] = True
    summary: ClassVar[str] = "Score compressions on tasks; write a run directory."
    examples: ClassVar[str] = (
        "  kvjax eval --compression snapkv,h2o --keep 0.5,0.1 --tasks recall,chain\n"
        "  kvjax eval --model smollm2 --suite ruler --length 1024\n"
        "  kvjax eval --config my.yaml --model DIR --out results/mine\n"
        "  kvjax eval --compression snapkv --compression.evict.score.window 16\n"
        "  kvjax eval --set batch=8 --set overrides.snapkv.evict.score.kernel=7\n"
        "\n"
        "`none` (the reference) and `random` (the floor) always run. Tasks that the\n"
        "configuration has keep its settings. overrides.NAME.PATH is a field of one\n"
        "compression. A run that was interrupted goes on when the same command is\n"
        "given again; `kvjax report OUT` draws the result."
    )

    config: Annotated[str | None, optional("NAME|FILE", CONFIGS)] = None
    model: OptionalModel = None
    compression: Names = None
    """Compressions from the list above or YAML files, with commas between."""
    keep: Names = None
    """Fractions kept, for all that have a budget: 0.5,0.25,0.1."""
    tasks: Annotated[str | None, optional("A,B,C", TASK_NAMES)] = None
    suite: Annotated[str | None, optional("NAME", SUITE_NAMES)] = None
    task_set: Assignments = ()
    """Set a field of a task, or of all that have it: --task-set qa_1.path=squad.json,
    --task-set '*.essays=DIR'."""
    allow_code: Flag = False
    """Run code that the model writes (humaneval), in a guarded process."""
    lengths: Annotated[
        str | None, tyro.conf.arg(metavar="N,N", aliases=("--length",))
    ] = None
    """Tokens of prompt and reply: 512,1024."""
    items: Items = None
    """Questions per cell."""
    seed: Seed = None
    """Of the questions."""
    visibility: Names = None
    """query_agnostic (compress before the question is known), query_aware, or both."""
    set: Assignments = ()
    """Set a field of the evaluation: --set batch=8."""
    compression_set: Assignments = ()
    """Set a field of every compression; short: --compression.PATH VALUE."""
    chat: Literal["auto", "always", "never"] | None = None
    """Whether tasks are asked by the model's chat template; auto: those in words."""
    export: Annotated[Literal["kvpress"] | None, optional("kvpress")] = None
    """Also write the run as kvpress's evaluation does, to OUT/kvpress."""
    out: Folder = None
    """Run directory; results/CONFIG-MODEL if left out."""
    dtype: Dtype = "auto"
    """Of the parameters; auto: float32 if bundled or fetched, else bfloat16."""
    mesh: Mesh = None
    """Devices: data splits rows, model splits heads, as in data=2,model=4."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        config = self.configured()
        name = pathlib.Path(self.base).stem, pathlib.Path(config.model).name
        out = self.out or pathlib.Path("results") / "-".join(name)
        rows, resumed, exported = evaluate(
            config, out, self.dtype, ui, export=self.export, mesh=self.mesh
        )
        return {
            "run": str(out),
            "resumed_cells": resumed,
            "exported": exported,
            "rows": rows,
        }

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        print_scores(console, result["rows"])
        if result["resumed_cells"]:
            print(f"{result['resumed_cells']} cells are of an earlier call.")
        print(f"run directory: {result['run']}")
        if result["exported"]:
            print(f"for kvpress:   {len(result['exported'])} folders beside its rows")
        print(f"to draw it:    kvjax report {result['run']}")

    @property
    def base(self) -> str:
        """The evaluation that the options change."""
        return self.config or (self.suite and "words") or "demo"

    def configured(self):
        """The evaluation that the options describe."""
        assignments = parse_assignments(self.set)
        flat = {path: v for path, v in assignments.items() if _is_flat(path)}
        changes = {p: v for p, v in assignments.items() if p not in flat}
        everywhere = parse_assignments(self.compression_set)
        if _BUDGET in everywhere:  # the budget of an evaluation is what it sweeps
            changes["keeps"] = [everywhere.pop(_BUDGET)]
        options = self._options()
        self._check_once([*assignments, *changes], options)
        changes |= options
        config = load_config(self.base, changes)
        config = self._with_tasks(config)
        merged = {"everywhere": {**config.everywhere, **everywhere}}
        merged["overrides"] = {k: dict(v) for k, v in config.overrides.items()}
        if self.compression is not None:  # what was said of others says nothing now
            here = {RANDOM, *map(label_of, config.compressions)}
            for name in merged["overrides"].keys() - here:
                del merged["overrides"][name]
        merged["defaults"] = dict(config.defaults)
        for path, value in flat.items():
            _merge(merged, path, value)
        return dataclasses.replace(config, **merged)

    def _with_tasks(self, config: EvalConfig) -> EvalConfig:
        """The evaluation with the tasks that the options name."""
        fields: dict[str, dict[str, Any]] = {}
        for path, value in parse_assignments(self.task_set).items():
            title, _, field = path.rpartition(".")
            if not title:
                raise ValueError(
                    f"--task-set needs TASK.FIELD=VALUE; got {shown(path)}."
                )
            fields.setdefault(title, {})[field] = value
        if self.allow_code:
            fields.setdefault("*", {})["allow_code"] = True
        entries = config.tasks
        if self.tasks is not None:
            entries = _tasks(config, self.tasks)
        if self.suite is not None:
            beside = entries if self.tasks is not None else ()
            entries = suite(self.suite, fields, beside)
        elif fields:
            entries = tuple(with_fields(entries, fields))
        return dataclasses.replace(config, tasks=entries)

    def _check_once(self, paths: Sequence[str], options: Mapping[str, Any]) -> None:
        """No field is given both by an option of its own and in another way."""
        asked = self.tasks is not None or self.suite is not None
        given = {*options, *(["tasks"] if asked else [])}
        for path in paths:
            field = path.partition(".")[0]
            if field in given:
                names = {"keeps": "--keep", "compressions": "--compression"}
                raise ValueError(
                    f"`{field}` is given twice: by {names.get(field, option(field))} "
                    f"and by {shown(path)}. Give it once."
                )

    def _options(self) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if self.keep is not None:
            changes["keeps"] = list(numbers("--keep", self.keep, float))
        if self.lengths is not None:
            changes["lengths"] = list(numbers("--lengths", self.lengths, int))
        if self.compression is not None:
            changes["compressions"] = list(split(self.compression))
        if self.visibility is not None:
            changes["visibility"] = list(split(self.visibility))
        for name in ("model", "items", "seed", "chat"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        return changes


def _is_flat(path: str) -> bool:
    """Whether what follows is a path of a compression, dots and all."""
    return path.partition(".")[0] in ("overrides", "everywhere", "defaults")


def _merge(merged: dict[str, Any], path: str, value: Any) -> None:
    """Set what a flat path leads to: one field, or a mapping of them."""
    head, _, rest = path.partition(".")
    place = merged[head]
    if head == "overrides" and rest:
        name, _, rest = rest.partition(".")
        place = place.setdefault(name, {})
    if rest:
        place[rest] = value
    elif not isinstance(value, Mapping):
        raise ValueError(f"--set {path} must be a mapping; got {shown(value)}.")
    else:
        place.clear()
        place.update(value)


def _tasks(config, names: str) -> tuple[Any, ...]:
    known = {entry.title: entry for entry in config.tasks}
    return tuple(known.get(name) or TaskEntry(name=name) for name in split(names))


def evaluate(
    config,
    out: pathlib.Path,
    dtype: str,
    ui: UI,
    export: str | None = None,
    mesh: str | None = None,
) -> tuple[Sequence[Mapping[str, Any]], int, list[str]]:
    """Run an evaluation with a progress bar.

    Returns:
        Its rows, how many were there, and the folders of `export`.
    """
    from kvjax.eval.export import check_export, export_kvpress
    from kvjax.eval.harness import run
    from kvjax.eval.methods import methods
    from kvjax.eval.plan import plan
    from kvjax.eval.results import check_directory

    # Neither a misspelt name nor a directory of something else costs loading a model.
    methods(config)
    check_directory(out, config)
    name = DEFAULT if config.model is None else config.model
    model, tokenizer = load_model(name, dtype, ui, mesh)
    checkpoint = expanded(model_directory(name))
    made = plan(model.config, tokenizer, config) if export else None
    if made:
        check_export(made, out, out / "kvpress")
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    resumed = 0
    with Progress(*columns, console=ui.err, disable=not ui.bars) as bar:
        task = bar.add_task("checking", total=None)

        def tell(state) -> None:
            nonlocal resumed
            resumed += state.resumed
            bar.update(
                task,
                completed=state.done,
                total=state.total,
                description=escape(state.cell),
            )
            if interrupted():
                raise KeyboardInterrupt

        with noted_interrupt(signal.SIGINT) as interrupted:
            rows = run(
                model,
                tokenizer,
                config,
                out,
                checkpoint=checkpoint if checkpoint.exists() else None,
                progress=tell,
            )
        bar.update(task, description="done")
    folders = []
    if made:
        folders = export_kvpress(made, out, out / "kvpress")
    return rows, resumed, [str(folder) for folder in folders]
