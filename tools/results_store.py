"""The numbers behind a page of docs/results/, as `docs/results/PAGE.json` keeps them.

What was measured once is part of a page until it is measured again, so a page can be
brought up to date model by model.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from results_pages import Found

CONFIG = ("items", "lengths", "seed", "keeps", "tasks", "overrides")
"""What is kept of an evaluation's configuration: no path of the machine that ran it."""
HEADER = ("date", "device", "dtype", "jax", "model_fingerprint")


def read(path: pathlib.Path) -> dict[str, Found]:
    """Evaluations by name; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        return {name: _found(one) for name, one in text.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold evaluations ({error!r}). Restore it from git, or "
            "delete it and measure all models of the page again."
        ) from error


def _found(one: Mapping[str, Any]) -> Found:
    cells = {tuple(row[:4]): row[4:] for row in one["cells"]}
    return Found(
        scores={cell: score for cell, (score, _) in cells.items()},
        bytes={cell: held for cell, (_, held) in cells.items()},
        header=one["header"],
    )


def write(path: pathlib.Path, found: Mapping[str, Found]) -> None:
    """Write evaluations, a line per cell, whose last number is bytes per prompt."""
    blocks = []
    for name, one in found.items():
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
