"""Everything an evaluation will run, checked before the first compute."""

import dataclasses
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from kvjax.config import decode
from kvjax.eval import asking
from kvjax.eval.config import TEXT, EvalConfig, TaskEntry
from kvjax.eval.fidelity import TextGroup, TextTask
from kvjax.eval.groups import AbstractGroup
from kvjax.eval.methods import Method, methods
from kvjax.eval.rows import LONGEST
from kvjax.eval.text import Tokenizer
from kvjax.messages import shown
from kvjax.models import checks
from kvjax.models.config import DecoderConfig
from kvjax.models.padding import bucket

MOST_CHARACTERS = 64
"""Of a token, for what cannot fit a model whatever its tokenizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One row to be.

    Attributes:
        group: its prompts.
        method: its compression.
        keep: its budget, or None.
        depth: place of the needle, or None.
        turn: which question, from 1, or None where there is one.
    """

    group: AbstractGroup
    method: Method
    keep: float | None
    depth: float | None
    turn: int | None = None

    @property
    def items(self) -> Sequence[int]:
        """Which of the group's prompts it is of."""
        group = self.group
        first = group.depths.index(self.depth) * group.per_depth
        every = range(first, first + group.per_depth)
        return [i for i in every if group.asks(i, (self.turn or 1) - 1)]

    @property
    def name(self) -> str:
        """File name of its row."""
        group = self.group
        parts = [group.title, str(group.length), group.visibility, self.method.name]
        if self.keep is not None:
            parts.append(f"keep{self.keep:g}")
        if self.depth is not None:
            parts.append(f"depth{self.depth:g}")
        if self.turn is not None:
            parts.append(f"turn{self.turn}")
        return "-".join(parts).replace("/", "_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """The groups and methods of an evaluation, and the cells they make."""

    config: EvalConfig
    groups: tuple[AbstractGroup, ...]
    methods: tuple[Method, ...]

    def cells(self, group: AbstractGroup, method: Method) -> list[Cell]:
        """The cells of one method on one group, budget by budget."""
        return [
            Cell(group=group, method=method, keep=keep, depth=depth, turn=turn)
            for keep in method.keeps(self.config.keeps)
            for depth in group.depths
            for turn in (range(1, group.turns + 1) if group.turns > 1 else (None,))
        ]

    def all_cells(self) -> list[Cell]:
        """All cells, in the order they run."""
        return [
            cell
            for group in self.groups
            for method in self.methods
            for cell in self.cells(group, method)
        ]


def plan(model: DecoderConfig, tokenizer: Any, config: EvalConfig) -> EvalPlan:
    """All cells of an evaluation of `model`.

    Raises:
        ValueError: unknown tasks, compressions or fields; lengths that do not fit the
            task or the model; budgets below what a method protects; characters that
            the tokenizer does not know; a file that is missing or too short.
    """
    tokenizer = Tokenizer(tokenizer, model.vocab_size)
    chosen = methods(config)
    _check_apart(config)
    _check_lengths(model, config)
    groups: list[AbstractGroup] = []
    for entry in config.tasks:
        if entry.name == TEXT:
            groups.append(_text_group(entry, config, tokenizer))
        else:
            groups += asking.groups(entry, config, tokenizer, model.eos_tokens)
    made = EvalPlan(config=config, groups=tuple(_one_width(groups)), methods=chosen)
    for group in made.groups:
        _check_range(model, group)
        for method in chosen:
            _check_budgets(model, group, method, config)
    _check_names(made)
    return made


def _check_apart(config: EvalConfig) -> None:
    """Values that cells are named by differ as they are printed."""
    needle = any(entry.depths for entry in config.tasks)
    lists: dict[str, Sequence[Any]] = {"keeps": config.keeps, "lengths": config.lengths}
    lists["depths"] = config.depths if needle else ()
    for number, entry in enumerate(config.tasks):
        lists[f"tasks.{number}.lengths"] = entry.lengths
        lists[f"tasks.{number}.visibility"] = entry.visibility
    for field, values in lists.items():
        seen: dict[str | int, Any] = {}
        for value in values:
            text = value if isinstance(value, str | int) else f"{value:g}"
            if text in seen:
                raise ValueError(
                    f"`{field}` lists {seen[text]} and {value}, and names of rows have "
                    f"both as {text}. Leave one of them out."
                )
            seen[text] = value


def _check_names(made: EvalPlan) -> None:
    """Files can have the names of the cells, and each has its own."""
    seen: set[str] = set()
    for cell in made.all_cells():
        name, title, method = cell.name, cell.group.title, cell.method.name
        what = "is of two cells" if name in seen else ""
        if any(unicodedata.category(one) == "Cc" for one in name):
            what = "holds a control character"
        if (size := len(name.encode())) > LONGEST:
            what = f"has {size} bytes, more than {LONGEST}"
        if what:
            raise ValueError(
                f"the name of a row {what}: {shown(name)}. It is made of the `label` "
                f"of task {shown(title)} and of compression {shown(method)}: give the "
                "task a shorter or other `label`, or rename the compression's file."
            )
        seen.add(name)


def _check_lengths(model: DecoderConfig, config: EvalConfig) -> None:
    """Before texts are made of that length; a token has some characters."""
    most = MOST_CHARACTERS * model.max_positions
    for entry in config.tasks:
        for length in entry.lengths or config.lengths:
            if length > most:
                raise ValueError(
                    f"task {entry.title!r} at length {length}: the model's range is "
                    f"{model.max_positions} positions. Lower `lengths`."
                )


def _text_group(
    entry: TaskEntry, config: EvalConfig, tokenizer: Tokenizer
) -> TextGroup:
    if entry.lengths or entry.visibility:
        raise ValueError(
            f"task {entry.title!r} takes no `lengths` and no `visibility`; "
            "set `context` and `continuation`."
        )
    if entry.grid or entry.turns > 1:
        raise ValueError(
            f"task {entry.title!r} asks no questions, and takes neither `grid` nor "
            "`turns`. Leave them out."
        )
    text = decode(dict(entry.fields), TextTask)
    count = entry.items or config.items
    rows = text.windows(tokenizer, count)
    return TextGroup(
        title=entry.title,
        length=text.context + text.continuation,
        visibility="query_agnostic",  # no question is asked
        depths=(None,),
        prompts=tuple(tuple(row[: text.context].tolist()) for row in rows),
        batch=min(config.batch, count),
        width=bucket(text.context),
        tokenizer=tokenizer,
        text=text,
        follow=rows[:, text.context :],
    )


def _one_width(groups: Sequence[AbstractGroup]) -> Iterator[AbstractGroup]:
    """Prompts of one length are padded alike, so that tasks share their programs."""
    widths: dict[int, int] = {}
    for group in groups:
        widths[group.length] = max(widths.get(group.length, 0), group.width)
    for group in groups:
        yield dataclasses.replace(group, width=widths[group.length])


def _check_range(model: DecoderConfig, group: AbstractGroup) -> None:
    total = int(group.lengths.max()) + group.room
    if total > model.max_positions:
        raise ValueError(
            f"task {group.title!r} at length {group.length} needs {total} positions "
            f"({group.room} of them for question and reply), the model's range is "
            f"{model.max_positions}. Lower `lengths`, or use another model."
        )


def _check_budgets(
    model: DecoderConfig, group: AbstractGroup, method: Method, config: EvalConfig
) -> None:
    for keep in method.keeps(config.keeps):
        try:
            c = method.at(keep, group.visibility)
            checks.compression(model, c, jnp.asarray(group.lengths))
        except ValueError as wrong:
            hint = " In an evaluation, `window` cuts all observation windows."
            raise ValueError(
                f"{method.name} at keep={keep} cannot run on task {group.title!r} at "
                f"length {group.length}: {wrong}{hint if method.windowed else ''}"
            ) from None
