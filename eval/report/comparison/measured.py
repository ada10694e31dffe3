"""What a finished evaluation says of a model: accuracies and bytes, cell by cell."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.eval.config import TEXT
from kvjax.eval.header import read_header
from kvjax.eval.results import load_rows

CellKey = tuple[str, str, str, float | None]
"""Task, visibility, compression, keep."""

ModelScores = Mapping[str, Mapping[CellKey, float]]
"""Accuracies per model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One evaluation of one model.

    Attributes:
        scores: accuracy per cell, in [0, 1].
        bytes: of the cache per prompt and cell; None where they are not known.
        losses: nats per token, of the cells of texts.
        header: its `run.json`.
    """

    scores: Mapping[CellKey, float]
    bytes: Mapping[CellKey, float | None]
    header: Mapping[str, Any]
    losses: Mapping[CellKey, float] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether every task and arm of the configuration has the same columns."""
        config = self.header["config"]
        groups = {
            (task["label"] or task["name"], arm)
            for task in config["tasks"]
            for arm in _arms(task, config)
        }
        columns = [{c[2:] for c in self.scores if c[:2] == group} for group in groups]
        return all(column and column == columns[0] for column in columns)


def _arms(task: Mapping[str, Any], config: Mapping[str, Any]) -> Sequence[str]:
    """Where a task is compressed; behind texts nothing is asked."""
    if task["name"] == TEXT:
        return ["query_agnostic"]
    return task["visibility"] or config["visibility"]


def measured(directory: pathlib.Path) -> Measured:
    """What a run directory holds by now.

    Raises:
        ValueError: see `kvjax.eval.results.load_rows`.
    """
    cells: dict[CellKey, dict[str, Any]] = {
        (row["task"], row["visibility"], row["compression"], row["keep"]): row
        for row in load_rows(directory).to_pylist()
    }
    return Measured(
        scores={cell: row["score"] for cell, row in cells.items()},
        bytes={cell: row["resident_bytes"] for cell, row in cells.items()},
        losses={
            cell: row["nll"] for cell, row in cells.items() if row["nll"] is not None
        },
        header=read_header(directory),
    )


def losses_by_model(
    evaluations: Mapping[str, Measured],
) -> dict[str, dict[CellKey, float]]:
    """Nats per token of texts per model, over its evaluations."""
    out: dict[str, dict[CellKey, float]] = {}
    for name, one in evaluations.items():
        out.setdefault(name.partition("-")[2], {}).update(one.losses)
    return out


def by_model(
    evaluations: Mapping[str, Measured],
    renamed: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[CellKey, float]]:
    """Accuracies per model, over its evaluations.

    Args:
        evaluations: by name, `CONFIG-MODEL`.
        renamed: per configuration, the compressions that count, and what they are
            called beside those of the others; of a configuration that is not listed
            all count.
    """
    out: dict[str, dict[CellKey, float]] = {}
    for name, one in evaluations.items():
        config, _, model = name.partition("-")
        cells = out.setdefault(model, {})
        for (task, visibility, compression, keep), value in one.scores.items():
            names = renamed.get(config, {compression: compression})
            if compression in names:
                cells[task, visibility, names[compression], keep] = value
    return out


def conditions(headers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How evaluations were run, by their `run.json`; all values where they differ."""
    rows = [
        {
            "items per cell": header["config"]["items"],
            "tokens": " ".join(map(str, _lengths(header["config"]))),
            "dtype": header["dtype"],
            "JAX": header["jax"],
            "device": header["device"],
            "date": header["date"][:10],
        }
        for header in headers
    ]
    return {
        key: " and ".join(dict.fromkeys(str(row[key]) for row in rows))
        for key in rows[0]
    }


def _lengths(config: Mapping[str, Any]) -> Sequence[int]:
    """Of the prompts, those of tasks that have their own among them.

    In pages of older runs tasks are names, or have no lengths.
    """
    tasks = [one for one in config.get("tasks", ()) if isinstance(one, Mapping)]
    own = {n for task in tasks for n in task.get("lengths", ())}
    return sorted({*config["lengths"], *own})
