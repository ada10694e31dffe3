"""A run in the folder layout of kvpress's evaluation, to stand beside its leaderboard.

DIR/<dataset>__<length>__<model>__<compression>__<share removed>[__query_aware]/
    predictions.csv    a row per question
    metrics.json       per task, in percent
    config.yaml        what ran

Source: github.com/NVIDIA/kvpress, `evaluation/evaluate.py`. Deviations: (1) a length, a
compression and a budget of a run have a folder, with all tasks in it; (2) `config.yaml`
says of kvpress's fields those that have a meaning here, and under `kvjax` what made
it; (3) tasks of others than RULER's are scored as `score`.
"""

import contextlib
import csv
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kvjax.eval.asking import AWARE
from kvjax.eval.header import RECORD, read_header
from kvjax.eval.plan import Cell, EvalPlan
from kvjax.eval.questions import QuestionGroup
from kvjax.eval.record import mean
from kvjax.eval.rows import read_rows
from kvjax.eval.tasks import RULER
from kvjax.files import read_yaml, write_bytes
from kvjax.places import check_place

PREDICTIONS, METRICS, CONFIG = "predictions.csv", "metrics.json", "config.yaml"
COLUMNS: tuple[str, ...] = (
    "task",
    "question",
    "answer_prefix",
    "answer",
    "max_new_tokens",
    "predicted_answer",
    "compression_ratio",
)


def export_kvpress(
    made: EvalPlan, run_dir: str | os.PathLike[str], out: str | os.PathLike[str]
) -> list[pathlib.Path]:
    """Write the finished cells of a run as kvpress would have written them.

    Args:
        made: the plan of the run.
        run_dir: its directory.
        out: where the folders go.

    Returns:
        The folders.

    Raises:
        ValueError: a folder is there that is of another run; the run has no questions.
        OSError: a file cannot be written.
    """
    run, place = pathlib.Path(run_dir), pathlib.Path(out)
    folders = check_export(made, run, place)
    identity = _identity(run)
    return [
        _write(place / name, made, cells, run, identity)
        for name, cells in folders.items()
    ]


def check_export(
    made: EvalPlan, run_dir: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, list[Cell]]:
    """Whether a run, which need not have begun, can be written so; its folders.

    Raises:
        ValueError: see `export_kvpress`.
    """
    run, place = pathlib.Path(run_dir), pathlib.Path(out)
    check_place(place)
    folders: dict[str, list[Cell]] = {}
    for cell in made.all_cells():
        if isinstance(cell.group, QuestionGroup):
            folders.setdefault(_folder(made, cell), []).append(cell)
    if not folders:
        raise ValueError(
            f"{run} asks no questions, and kvpress's layout has nothing else. Evaluate "
            "tasks with answers."
        )
    identity = _identity(run) if (run / RECORD).exists() else {}
    for name in folders:
        check_place(place / name)
        _check_own(place / name, identity)
    return folders


def _identity(run: pathlib.Path) -> dict[str, Any]:
    about = read_header(run)
    names = ("model_fingerprint", "dtype", "date", "inputs")
    return {key: about.get(key) for key in names}


def removed(cell: Cell) -> float:
    """Share of the tokens that is removed: what kvpress calls `compression_ratio`."""
    return 0.0 if cell.keep is None else 1.0 - cell.keep


def _folder(made: EvalPlan, cell: Cell) -> str:
    parts = [
        _dataset(made),
        str(cell.group.length),
        made.config.model.replace("/", "--"),
        cell.method.name,
        _removed(made, cell),
    ]
    if cell.group.visibility == AWARE:
        parts.append("query_aware")
    return "__".join(parts)


def _removed(made: EvalPlan, cell: Cell) -> str:
    """With two digits, as kvpress has it; with all where two budgets share these."""
    share = removed(cell)
    text = f"{share:.2f}"
    alike = [keep for keep in made.config.keeps if f"{1.0 - keep:.2f}" == text]
    return text if len(alike) < 2 or cell.keep is None else f"{share:g}"


def _dataset(made: EvalPlan) -> str:
    groups = [one for one in made.groups if isinstance(one, QuestionGroup)]
    return "ruler" if all(_of_ruler(one) for one in groups) else "kvjax"


def _of_ruler(group: QuestionGroup) -> bool:
    return group.task.name in RULER


def _check_own(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """A folder that is there is of this run."""
    if not folder.exists():
        return
    config = folder / CONFIG
    old: dict[Any, Any] = {}
    with contextlib.suppress(ValueError):  # none, or a damaged one
        old = read_yaml(config)
    if not identity or old.get("kvjax") != _plain(identity):
        raise ValueError(
            f"{folder} is of another run. Move it away, or export into another folder."
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _write(
    folder: pathlib.Path,
    made: EvalPlan,
    cells: Sequence[Cell],
    run: pathlib.Path,
    identity: Mapping[str, Any],
) -> pathlib.Path:
    rows: list[dict[str, Any]] = []
    metrics: dict[str, dict[str, float]] = {}
    for cell in cells:
        found = read_rows(run / "items" / f"{cell.name}.parquet")
        rows += _predictions(cell, found)
        score, _ = mean(found, "score")
        group = cell.group
        assert isinstance(group, QuestionGroup) and score is not None
        measure = "string_match" if _of_ruler(group) else "score"
        metrics[_title(cell)] = {measure: round(100 * score, 2)}
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS)
    table.writeheader()
    table.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    first = cells[0]
    config = {
        "dataset": _dataset(made),
        "data_dir": str(first.group.length),
        "model": made.config.model,
        "press_name": first.method.name,
        "compression_ratio": removed(first),
        "query_aware": first.group.visibility == AWARE,
        "seed": made.config.seed,
        "press_init_command": f"{first.method.name} {first.method.overrides_json}",
        "kvjax": _plain(identity),
    }
    # The record of whose it is goes first: what is cut off is written again.
    write_bytes(folder / CONFIG, yaml.safe_dump(config, sort_keys=False).encode())
    write_bytes(folder / PREDICTIONS, text.getvalue().encode())
    write_bytes(folder / METRICS, (json.dumps(metrics, indent=4) + "\n").encode())
    return folder


def _title(cell: Cell) -> str:
    title = cell.group.title
    if cell.depth is not None:
        title += f"_depth{cell.depth:g}"
    return title if cell.turn is None else f"{title}_turn{cell.turn}"


def _predictions(
    cell: Cell, found: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    group, turn = cell.group, (cell.turn or 1) - 1
    assert isinstance(group, QuestionGroup)
    aware, out = group.visibility == AWARE, []
    for i, item in zip(cell.items, found, strict=True):
        one = group.episodes[i].turns[turn]
        out.append(
            {
                "task": _title(cell),
                "question": "" if aware else one.question,
                "answer_prefix": one.prefix,
                "answer": str(list(one.answers or (one.answer,))),
                "max_new_tokens": one.max_new_tokens or group.task.max_new_tokens,
                "predicted_answer": item["reply"],
                "compression_ratio": removed(cell),
            }
        )
    return out
