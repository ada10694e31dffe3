"""The numbers behind a page, as a JSON file that is kept beside it.

What was measured once is part of a page until it is measured again, so a page can be
brought up to date model by model.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.eval.report.comparison.measured import CellKey, Measured, measured

CONFIG = ("items", "lengths", "seed", "keeps", "tasks", "overrides")
"""What is kept of an evaluation's configuration: no path of the machine that ran it."""
HEADER = ("date", "device", "dtype", "jax", "model_fingerprint")


def gather(
    path: pathlib.Path, names: Sequence[str], runs: pathlib.Path
) -> tuple[dict[str, Measured], list[pathlib.Path]]:
    """The evaluations of a page, as they were measured last.

    Args:
        path: the page's numbers, there or not.
        names: of the page's evaluations.
        runs: folder of their run directories, there or not.

    Returns:
        Those that are finished in `runs`, else those of `path`, in the order of
        `names`; and the run directories that are not finished.
    """
    found, unfinished = read_numbers(path), []
    for name in names:
        directory = runs / name
        if not (directory / "run.json").is_file():
            continue
        one = measured(directory)
        if one.whole:
            found[name] = one
        else:
            unfinished.append(directory)
    return {name: found[name] for name in names if name in found}, unfinished


def read_numbers(path: pathlib.Path) -> dict[str, Measured]:
    """Evaluations by name; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {name: _measured(one) for name, one in tree.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold evaluations ({error!r}). Restore it from git, or "
            "delete it and measure all models of the page again."
        ) from error


def _measured(one: Mapping[str, Any]) -> Measured:
    cells = {tuple(row[:4]): row[4:] for row in one["cells"]}
    return Measured(
        scores={cell: numbers[0] for cell, numbers in cells.items()},
        bytes={cell: numbers[1] for cell, numbers in cells.items()},
        header=one["header"],
        losses={cell: rest[2] for cell, rest in cells.items() if len(rest) > 2},
    )


def write_numbers(path: pathlib.Path, evaluations: Mapping[str, Measured]) -> None:
    """Write evaluations, a line per cell.

    The numbers of a cell are its score, bytes per prompt and, of a text, its loss.
    """
    blocks = []
    for name, one in evaluations.items():
        rows = [
            json.dumps([*cell, score, one.bytes.get(cell), *_loss(one, cell)])
            for cell, score in one.scores.items()
        ]
        header = json.dumps(_header(one.header))
        cells = ",\n".join(rows)
        blocks.append(f'"{name}": {{"header": {header},\n"cells": [\n{cells}]}}')
    path.write_text("{" + ",\n".join(blocks) + "}\n", encoding="utf-8")


def _loss(one: Measured, cell: CellKey) -> tuple[float, ...]:
    return (one.losses[cell],) if cell in one.losses else ()


def _header(header: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: header[key] for key in HEADER if key in header}
    config = header["config"]
    config = {key: config[key] for key in CONFIG if key in config}
    return kept | {"config": _placeless(config)}


def _placeless(value: Any) -> Any:
    """A tree with the names of files instead of their places."""
    if isinstance(value, Mapping):
        return {key: _placeless(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_placeless(one) for one in value]
    if isinstance(value, str) and pathlib.Path(value).is_absolute():
        return pathlib.Path(value).name
    return value
