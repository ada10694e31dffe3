"""What an evaluation runs: tasks, compressions and budgets, from strict YAML."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from kvjax.compress.config import VISIBILITIES
from kvjax.config import decode, override
from kvjax.types import nearest

TEXT = "text"
"""The fidelity task: teacher-forced text instead of questions."""

NEEDLE = "niah"
"""`recall` with the asked record at each of `EvalConfig.depths`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """One task of an evaluation.

    Attributes:
        name: a generated task, `niah`, or `text`.
        fields: the task's own fields. For `text` they may stand beside `name`.
        label: what rows call it; needed where a task occurs twice.
        lengths: instead of the evaluation's.
        items: instead of the evaluation's; for `niah`, per depth.
        visibility: instead of the evaluation's.
    """

    name: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    lengths: tuple[int, ...] = ()
    items: int | None = None
    visibility: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What rows call it."""
        return self.label or self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """An evaluation: every task with every compression at every budget.

    Attributes:
        model: checkpoint directory, hub id, or the name of a bundled model.
        compressions: presets or YAML files. `none` (the reference) and `random` (the
            floor at each budget) always run, listed or not.
        keeps: fractions kept, for every compression that has a budget.
        tasks: what is asked.
        lengths: tokens of prompt and answer together, at most.
        items: questions per cell.
        batch: rows of a batch.
        seed: of the held-out items.
        visibility: whether scores see the question: `query_agnostic` compresses
            between context and question, `query_aware` behind the question.
        depths: places of the needle, as fractions of the context.
        reply_tokens: caches get room for replies of at least this many tokens. Tasks
            whose caches have the same room share their compiled programs.
        window: longest observation or recent window; longer ones are cut to it, so
            that small budgets of short prompts hold what a method protects. The delay
            of `dms` is one: 1 is immediate eviction.
        share_passes: methods that read prompts in the same way look at one pass over
            each batch. Keeps queries, keys and values of all prompts of a task in
            memory; `prefill_ms` is that of the pass and of the method's own statistics.
        defaults: dotted paths to values, set wherever a compression has the field.
        everywhere: dotted paths to values; a compression without the field is an
            error. `none` and an unlisted `random` are left alone.
        overrides: per compression, dotted paths to values.
    """

    model: str = "kvjax-tiny"
    compressions: tuple[str, ...]
    keeps: tuple[float, ...]
    tasks: tuple[TaskEntry, ...]
    lengths: tuple[int, ...] = (512,)
    items: int = 100
    batch: int = 32
    seed: int = 1
    visibility: tuple[str, ...] = ("query_agnostic",)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    reply_tokens: int = 16
    window: int | None = None
    share_passes: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    everywhere: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("items", "batch", "reply_tokens"):
            _least(name, getattr(self, name), 1)
        _least("seed", self.seed, 0)
        if self.window is not None:
            _least("window", self.window, 1)
        for name in ("keeps", "tasks", "visibility", "compressions"):
            values = getattr(self, name)
            if not values and name != "compressions":
                raise ValueError(f"`{name}` must name at least one; got none.")
            keys = [getattr(v, "title", v) for v in values]
            if len(set(keys)) != len(keys):
                raise ValueError(
                    f"`{name}` lists something twice: {keys}. Remove it, or give "
                    "tasks a `label` each."
                )
        self._check_ranges()
        self._check_paths()

    def _check_ranges(self):
        for keep in self.keeps:
            if not 0.0 < keep <= 1.0:
                raise ValueError(
                    f"`keeps` are fractions kept, in (0, 1]; got {keep}. Keeping a "
                    "quarter is 0.25."
                )
        for value in [
            *self.visibility,
            *(value for entry in self.tasks for value in entry.visibility),
        ]:
            if value not in VISIBILITIES:
                raise ValueError(
                    f"Unknown visibility {value!r}; expected one of "
                    f"{list(VISIBILITIES)}.{nearest(value, VISIBILITIES)}"
                )
        for depth in self.depths:
            if not 0.0 <= depth <= 1.0:
                raise ValueError(f"`depths` must be in [0, 1]; got {depth}.")
        for entry in self.tasks:
            if entry.items is not None:
                _least(f"items of task {entry.title!r}", entry.items, 1)
            if entry.name == TEXT:
                continue
            if not (entry.lengths or self.lengths):
                raise ValueError(f"task {entry.title!r} needs `lengths`; got none.")
            for length in entry.lengths or self.lengths:
                _least("length", length, 1)
            if entry.name == NEEDLE and not self.depths:
                raise ValueError("task 'niah' needs `depths`; got none.")

    def _check_paths(self):
        paths = [*self.defaults, *self.everywhere]
        for assignments in self.overrides.values():
            paths += assignments
        for path in paths:
            head, _, last = path.rpartition(".")
            budget = head in ("evict.budget", "evict.values", "read", "store.keys")
            if path == "visibility" or (budget and last in ("keep", "slots", "bytes")):
                instead = "visibility" if path == "visibility" else "keeps"
                raise ValueError(
                    f"{path!r} cannot be overridden in an evaluation, which sweeps it. "
                    f"Set `{instead}`."
                )
            if not all(path.split(".")):
                raise ValueError(f"expected a dotted path; got {path!r}.")


def decode_config(tree: Any) -> EvalConfig:
    """`tree` (what `yaml.safe_load` returns) as an `EvalConfig`.

    A task may be given by its name alone.

    Raises:
        ValueError: unknown or missing keys, values out of range.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"an evaluation is a mapping of its fields; got {tree!r}.")
    tree = dict(tree)
    for field in dataclasses.fields(EvalConfig):
        value = tree.get(field.name)
        # A string would decode into the tuple of its letters.
        listed = str(field.type).startswith("tuple")
        if field.name in tree and listed and not isinstance(value, list | tuple):
            raise ValueError(
                f"EvalConfig.{field.name} must be a list; got {value!r}. Write "
                f"[{value}]."
            )
    if "tasks" in tree:
        tree["tasks"] = [_task(entry) for entry in tree["tasks"]]
    return decode(tree, EvalConfig)


def bundled_evaluations() -> list[str]:
    """Names of `configs/eval/`."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir())


def _folder():
    return importlib.resources.files("kvjax") / "configs" / "eval"


def load_config(
    name: str | pathlib.Path, /, overrides: Mapping[str, Any] | None = None
) -> EvalConfig:
    """A bundled evaluation (`demo`, `sweep`) or a YAML file, some fields changed.

    Args:
        name: bundled name, or path to a `.yaml` file.
        overrides: dotted paths to values, as `{"items": 50}`.

    Raises:
        ValueError: see `decode_config`; no such evaluation; not YAML.
    """
    path, text = pathlib.Path(name), None
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"no evaluation file at {path}.")
        text = path.read_text(encoding="utf-8")
    else:
        known = bundled_evaluations()
        if str(name) not in known:
            raise ValueError(
                f"Unknown evaluation {str(name)!r}; expected one of {known} or a path "
                f"to a .yaml file.{nearest(str(name), known)}"
            )
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as wrong:
        raise ValueError(f"evaluation {str(name)!r} is not YAML: {wrong}") from None
    try:
        return decode_config(override(tree, overrides or {}))
    except ValueError as wrong:
        raise ValueError(f"evaluation {str(name)!r}: {wrong}") from None


def _task(entry: Any) -> Any:
    if isinstance(entry, str):
        return {"name": entry}
    if not isinstance(entry, Mapping) or entry.get("name") != TEXT:
        return entry
    own = {field.name for field in dataclasses.fields(TaskEntry)}
    beside = {key: value for key, value in entry.items() if key not in own}
    kept = {key: value for key, value in entry.items() if key in own}
    return {**kept, "fields": {**beside, **kept.get("fields", {})}}


def _least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}; got {value!r}.")
