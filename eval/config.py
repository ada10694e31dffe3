"""What an evaluation runs: tasks, compressions and budgets, from strict YAML."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

from kvjax.compress.config import VISIBILITIES
from kvjax.config import decode, override
from kvjax.fields import Checked, Kept, OneOf, Positive, Range, Seed, Share
from kvjax.files import MOST_YAML, check_plain, read_text, yaml_mapping
from kvjax.messages import nearest, shown

Visibility = Annotated[str, OneOf(*VISIBILITIES)]
Items = Annotated[int, Range(1, 10**6)]
REQUESTS, SESSION = "requests", "session"
Mode = Annotated[str, OneOf(REQUESTS, SESSION)]
Chat = Annotated[str, OneOf("auto", "always", "never")]

TEXT = "text"
"""The fidelity task: teacher-forced text instead of questions."""

NEEDLE = "niah"
"""`recall` with the asked record at each of `EvalConfig.depths`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEntry(Checked):
    """One task of an evaluation.

    Attributes:
        name: a generated task, `niah`, or `text`.
        fields: the task's own fields. For `text` they may stand beside `name`.
        label: what rows call it; needed where a task occurs twice.
        lengths: instead of the evaluation's.
        items: instead of the evaluation's; for needle grids, per depth.
        visibility: instead of the evaluation's.
        turns: questions asked of each context; each has rows of its own.
        mode: several turns are `requests`, asked of one compressed context each, or a
            `session`, in which the cache goes on.
        golden: in a session, perfect replies stand between the questions; else those
            of the model.
        grid: the task at each of `EvalConfig.depths`, as its field `depth`.
    """

    name: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    lengths: tuple[Positive, ...] = ()
    items: Items | None = None
    visibility: tuple[Visibility, ...] = ()
    turns: Annotated[int, Range(1, 64)] = 1
    mode: Mode = REQUESTS
    golden: bool = True
    grid: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.turns == 1 and (self.mode != REQUESTS or not self.golden):
            raise ValueError(
                f"task {self.title!r}: `mode` and `golden` are of several turns; got "
                f"one. Raise `turns`, or leave them out."
            )

    @property
    def title(self) -> str:
        """What rows call it."""
        return self.label or self.name

    @property
    def depths(self) -> bool:
        """Whether it is asked at each of `EvalConfig.depths`."""
        return self.grid or self.name == NEEDLE


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
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
        chat: whether tasks are asked by the model's chat template: `auto` for tasks in
            words where there is one, `always`, or `never`.
        thinking: templates that know `enable_thinking` are told so.
        reply_tokens: caches get room for replies of at least this many tokens. Tasks
            whose caches have the same room share their compiled programs.
        window: longest observation or recent window; longer ones are cut to it, so
            that small budgets of short prompts hold what a method protects. The delay
            of `dms` is one: 1 is immediate eviction.
        share_passes: methods that read prompts in the same way look at one pass over
            each batch, whose queries, keys and values are in memory meanwhile; a task
            is then finished for all methods at once. `prefill_ms` is that of the pass
            and of the method's own statistics.
        defaults: dotted paths to values, set wherever a compression has the field.
        everywhere: dotted paths to values; a compression without the field is an
            error. `none` and an unlisted `random` are left alone.
        overrides: per compression, dotted paths to values.
    """

    model: str = "kvjax-tiny"
    compressions: tuple[str, ...]
    keeps: tuple[Kept, ...]
    tasks: tuple[TaskEntry, ...]
    lengths: tuple[Positive, ...] = (512,)
    items: Items = 100
    batch: Positive = 32
    seed: Seed = 1
    visibility: tuple[Visibility, ...] = ("query_agnostic",)
    depths: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    chat: Chat = "auto"
    thinking: bool = False
    reply_tokens: Positive = 16
    window: Positive | None = None
    share_passes: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    everywhere: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        for name in ("keeps", "tasks", "visibility", "compressions"):
            values = getattr(self, name)
            if not values and name != "compressions":
                raise ValueError(f"`{name}` must name at least one; got none.")
            keys = [v.title if isinstance(v, TaskEntry) else v for v in values]
            twice = [key for n, key in enumerate(keys) if key in keys[:n]]
            if twice:
                other = ", or give each task a `label`" if name == "tasks" else ""
                raise ValueError(
                    f"`{name}` lists {shown(twice[0])} twice. Remove one{other}."
                )
        self._check_plain()
        self._check_ranges()
        self._check_paths()

    def _check_plain(self):
        """`run.json` can hold it, and is equal to itself."""
        free = {f"tasks.{n}.fields": one.fields for n, one in enumerate(self.tasks)}
        for name in ("defaults", "everywhere", "overrides"):
            free[name] = getattr(self, name)
        for name, value in free.items():
            check_plain(name, value)

    def _check_ranges(self):
        for entry in self.tasks:
            if entry.name == TEXT:
                continue
            if not (entry.lengths or self.lengths):
                raise ValueError(f"task {entry.title!r} needs `lengths`; got none.")
            if entry.depths and not self.depths:
                raise ValueError(f"task {entry.title!r} needs `depths`; got none.")

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
    if isinstance(tree, Mapping) and isinstance(tree.get("tasks"), list | tuple):
        tree = {**tree, "tasks": [as_entry(entry) for entry in tree["tasks"]]}
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
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml"):
        text = read_text(path, MOST_YAML)
    else:
        known = bundled_evaluations()
        if str(name) not in known:
            raise ValueError(
                f"Unknown evaluation {shown(str(name))}; expected one of {known} or a "
                f"path to a .yaml file.{nearest(str(name), known)}"
            )
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    tree = yaml_mapping(text, f"evaluation {shown(str(name))}")
    try:
        return decode_config(override(tree, overrides or {}))
    except ValueError as wrong:
        raise ValueError(f"evaluation {shown(str(name))}: {wrong}") from None


def as_entry(entry: Any) -> Any:
    """A task as YAML says it, which may be its name alone, as a tree of `TaskEntry`."""
    if isinstance(entry, str):
        return {"name": entry}
    if not isinstance(entry, Mapping) or entry.get("name") != TEXT:
        return entry
    own = {field.name for field in dataclasses.fields(TaskEntry)}
    beside = {key: value for key, value in entry.items() if key not in own}
    kept = {key: value for key, value in entry.items() if key in own}
    fields = kept.get("fields", {})
    if not isinstance(fields, Mapping):
        return entry  # `decode` says what is wrong with it
    return {**kept, "fields": {**beside, **fields}}
