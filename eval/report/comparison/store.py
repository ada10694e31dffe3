"""The numbers behind a page, as a JSON file that is kept beside it.

What was measured once is part of a page until it is measured again, so a page can be
brought up to date model by model.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.eval.report.comparison.measured import Measured, measured

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
        scores={cell: score for cell, (score, _) in cells.items()},
        bytes={cell: size for cell, (_, size) in cells.items()},
        header=one["header"],
    )


def write_numbers(path: pathlib.Path, evaluations: Mapping[str, Measured]) -> None:
    """Write evaluations, a line per cell, whose last number is bytes per prompt."""
    blocks = []
    for name, one in evaluations.items():
        rows = [
            json.dumps([*cell, score, one.bytes.get(cell)])
            for cell, score in one.scores.items()
        ]
        header = json.dumps(_header(one.header))
        cells = ",\n".join(rows)
        blocks.append(f'"{name}": {{"header": {header},\n"cells": [\n{cells}]}}')
    path.write_text("{" + ",\n".join(blocks) + "}\n", encoding="utf-8")


def _header(header: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: header[key] for key in HEADER if key in header}
    config = header["config"]
    return kept | {"config": {key: config[key] for key in CONFIG if key in config}}
