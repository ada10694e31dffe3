"""The harness's own tasks and results, for the command line."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from kvjax.messages import nearest, shown

RESULTS = "results.json"


class Tasks(TaskManager):
    """Tasks that are loaded once, and what that raises is worded."""

    loaded: Any = None

    def load(self, task_list):
        """What the harness makes of names; the first call counts."""
        if self.loaded is None:
            try:
                self.loaded = super().load(task_list)
            # Tasks are programs of their authors, and read data from anywhere.
            except Exception as wrong:
                raise ValueError(
                    f"lm-eval cannot load {shown(task_list)} ({type(wrong).__name__}: "
                    f"{str(wrong)[:400]}). It may need the network, a package, or a "
                    "correction of its files."
                ) from wrong
        return self.loaded


def load_tasks(
    names: Sequence[str], folder: pathlib.Path | None, metadata: Mapping[str, Any]
) -> Tasks:
    """Tasks with their data, by names, patterns or YAML files.

    Args:
        names: of tasks, groups and tags of the harness, or of the folder.
        folder: with YAML files of tasks; it wins.
        metadata: what tasks that make their data are told.

    Raises:
        ValueError: an unknown name, or a task that cannot be loaded.
    """
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(
            f"there is no directory at {shown(str(folder))}; expected one with YAML "
            "files of tasks."
        )
    where: dict[str, Any] = {"metadata": dict(metadata)}
    where |= {} if folder is None else {"include_path": str(folder)}
    # To look through all of the harness's files takes seconds.
    tasks = _indexed(include_defaults=False, **where)
    if any(not _found(tasks, name) for name in names):
        tasks = _indexed(**where)
    for name in names:
        if not _found(tasks, name):
            raise ValueError(
                f"unknown task {shown(name)}; expected a task, group or tag of lm-eval "
                "(`lm_eval ls tasks` lists them), or a YAML file of one."
                f"{nearest(name, tasks.all_tasks)}"
            )
    found = [one for name in names for one in _found(tasks, name)]
    tasks.load(list(dict.fromkeys(found)))
    return tasks


def _indexed(**where: Any) -> Tasks:
    """The tasks of folders by their names; nothing of them is loaded."""
    try:
        return Tasks(**where)
    except Exception as wrong:  # of what files of anybody hold
        folder, kind = where.get("include_path", "its own"), type(wrong).__name__
        raise ValueError(
            f"lm-eval cannot list the tasks of {shown(folder)} ({kind}: "
            f"{str(wrong)[:400]}). Correct its YAML files: `task`, `group` and `tag` "
            "are texts."
        ) from wrong


def _found(tasks: TaskManager, name: str) -> list[str]:
    """The names that a name or a pattern stands for."""
    if name in tasks.task_index:
        return [name]
    if name.endswith((".yaml", ".yml")) and os.path.isfile(name):
        return [name]
    return tasks.match_tasks([name]) if "*" in name else []


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric of each task and group."""
    rows = []
    counts, shots = results.get("n-samples", {}), results.get("n-shot", {})
    for task, found in {**results["results"], **results.get("groups", {})}.items():
        for name, value in found.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            rows.append(
                {
                    "task": task,
                    "shots": shots.get(task),
                    "items": counts.get(task, {}).get("effective"),
                    "filter": filtered,
                    "metric": metric,
                    "value": plain(value),
                    "stderr": _number(found.get(f"{metric}_stderr,{filtered}")),
                }
            )
    return rows


def _number(value: Any) -> float | None:
    """A standard error; the harness writes N/A where there is none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def plain(tree: Any) -> Any:
    """What the harness returns, as JSON has it; null for what is not finite."""
    if isinstance(tree, Mapping):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    return plain(handle_non_serializable(tree))
