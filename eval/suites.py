"""Suites: the tasks of a benchmark under one name."""

import dataclasses
import importlib.resources
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.config import decode
from kvjax.eval.asking import parts
from kvjax.eval.config import TEXT, TaskEntry, as_entry
from kvjax.eval.tasks import TASKS, field_names
from kvjax.files import yaml_mapping
from kvjax.messages import nearest, shown

LOG = logging.getLogger("kvjax.eval")
EVERY = "*"


def suites() -> list[str]:
    """Names of `configs/suite/`."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir())


def suite(
    name: str,
    fields: Mapping[str, Mapping[str, Any]] | None = None,
    beside: Sequence[TaskEntry] = (),
) -> tuple[TaskEntry, ...]:
    """The tasks of a suite that can be asked here.

    Tasks that read a file are left out where there is none, which is said.

    Args:
        name: of the suite.
        fields: see `with_fields`.
        beside: tasks that are asked, too, and stand in front of them.

    Raises:
        ValueError: no such suite; see `with_fields`.
    """
    known = suites()
    if name not in known:
        raise ValueError(
            f"Unknown suite {shown(name)}; expected one of {known}."
            f"{nearest(name, known)}"
        )
    text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    tree = yaml_mapping(text, f"suite {name!r}")
    entries = [decode(as_entry(one), TaskEntry) for one in tree["tasks"]]
    every = with_fields([*beside, *entries], fields or {})
    there = every[: len(beside)]
    for entry in every[len(beside) :]:
        lacks = _lacks(entry)
        if lacks:
            LOG.warning("suite %s goes without %s: %s", name, entry.title, lacks)
        else:
            there.append(entry)
    if len(there) == len(beside):
        raise ValueError(f"none of the tasks of suite {name!r} can be asked here.")
    return tuple(there)


def with_fields(
    entries: Sequence[TaskEntry], fields: Mapping[str, Mapping[str, Any]]
) -> list[TaskEntry]:
    """Tasks with some of their fields set.

    Args:
        entries: the tasks.
        fields: by the title of a task, or `*` for all that have such a field.

    Raises:
        ValueError: a title that no task has; a field of `*` that none has.
    """
    titles = [entry.title for entry in entries]
    for title in fields:
        if title not in (*titles, EVERY):
            raise ValueError(
                f"fields are set of task {shown(title)}, which is not asked; expected "
                f"one of {[*titles, EVERY]}.{nearest(title, titles)}"
            )
    every = fields.get(EVERY, {})
    for field in every:
        if not any(_has(entry, field) for entry in entries):
            raise ValueError(
                f"no task that is asked has a field {shown(field)}. Name the task: "
                "TASK.FIELD=VALUE."
            )
    out = []
    for entry in entries:
        own = {field: v for field, v in every.items() if _has(entry, field)}
        merged = {**entry.fields, **own, **fields.get(entry.title, {})}
        out.append(dataclasses.replace(entry, fields=merged))
    return out


def _has(entry: TaskEntry, field: str) -> bool:
    return entry.name in TASKS and field in field_names(entry.name)


def _lacks(entry: TaskEntry) -> str:
    if entry.name == TEXT:
        if entry.fields.get("path"):
            return ""
        return f"it reads a text of yours (--task-set {entry.title}.path=FILE)."
    depth = 0.5 if entry.depths else None
    found = (task.lacks() for task in parts(entry, depth).values())
    return next((lacks for lacks in found if lacks), "")


def _folder():
    return importlib.resources.files("kvjax") / "configs" / "suite"
