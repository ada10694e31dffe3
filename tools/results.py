"""Train what makes models tolerant, measure it, write docs/results/: `make results`.

    python tools/results.py                          everything, hours on two cores
    python tools/results.py --models base tolerant   these alone
    python tools/results.py --items 50 --report-only

Everything is kept under `--work` and goes on where it stopped: checkpoints of runs,
exported models, finished cells of evaluations.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from results_pages import GAP, Cell, cells_table, conditions, dms_page, plot, tolerance

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results"
BASE = "kvjax-tiny"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the comparison.

    Attributes:
        recipe: of `configs/train/`, or empty for the bundled base model.
        sets: changes to it.
        evaluation: of `configs/eval/`.
        options: more for `kvjax eval`.
    """

    recipe: str = ""
    sets: tuple[str, ...] = ()
    evaluation: str = "tolerance"
    options: tuple[str, ...] = ()


MODELS: Mapping[str, Model] = {
    "base": Model(),
    "tolerant": Model(recipe="tolerant"),
    "control": Model(recipe="tolerant", sets=("sampling.choices=[]",)),
    "dms": Model(recipe="dms", evaluation="dms"),
    "untrained": Model(evaluation="dms", options=("--compression", "h2o,tova")),
}
"""`untrained` is the base model again, under what needs no training."""


def run(*command: object) -> None:
    """Run a command; its failure is ours."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT)


def model_path(name: str, work: pathlib.Path) -> str:
    """The trained model, made unless it is there."""
    model = MODELS[name]
    if not model.recipe:
        return BASE
    run_dir = work / "runs" / name
    if not (run_dir / "model" / "config.json").is_file():
        sets = [word for text in model.sets for word in ("--set", text)]
        given = ("--config", model.recipe, *sets, "--out", run_dir)
        run(sys.executable, "-m", "kvjax.cli", "finetune", *given)
    return str(run_dir / "model")


def evaluate(name: str, work: pathlib.Path, items: int | None) -> pathlib.Path:
    """The run directory of a model's evaluation, finished unless it is."""
    out = work / "evals" / name
    more = () if items is None else ("--items", items)
    config = ROOT / "configs" / "eval" / f"{MODELS[name].evaluation}.yaml"
    run(
        *(sys.executable, "-m", "kvjax.cli", "eval", "--config", config),
        *("--model", model_path(name, work), "--out", out, *more),
        *("--dtype", "float32"),
        *MODELS[name].options,
    )
    return out


def scores(directory: pathlib.Path) -> dict[Cell, float]:
    """Accuracy of every finished cell."""
    from kvjax.eval.results import load_rows

    return {
        (row["task"], row["visibility"], row["compression"], row["keep"]): row["score"]
        for row in load_rows(directory).to_pylist()
    }


def report(found: Mapping[str, Mapping[Cell, float]], notes: Mapping[str, Any]) -> None:
    """Write the page of tolerance, its figure and the numbers."""
    head = [
        "# Tolerance",
        "",
        "Written by `python tools/results.py` (`make results`); do not edit. "
        + ", ".join(f"{key}: {value}" for key, value in notes.items())
        + ".",
        "",
        "A gap is what compression costs the base model in one cell (a task, an arm of "
        f"visibility, a method, a budget), where that is at least {100 * GAP:.0f} "
        "points; *closed* is the share of it that the tuned model gets back, averaged "
        "over cells. "
        + (
            "`control` had the same steps without compression."
            if "control" in found
            else "The control, the same steps without compression, has not been run."
        ),
        "",
    ]
    lines = [*head, *tolerance(found), "", "![before and after](tolerance.svg)", ""]
    lines += ["## Cells", "", *cells_table(found), ""]
    (OUT / "tolerance.md").write_text("\n".join(lines), encoding="utf-8")
    numbers = {
        name: [[*cell, value] for cell, value in cells.items()]
        for name, cells in found.items()
    }
    text = json.dumps({"notes": notes, "scores": numbers}, indent=1)
    (OUT / "tolerance.json").write_text(text + "\n", encoding="utf-8")
    plot(found, OUT / "tolerance.svg")


def main() -> int:
    """Parse the command line, do what is missing, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "results")
    parser.add_argument("--items", type=int, help="per cell, instead of 500")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    if not args.report_only:
        for name in args.models:
            evaluate(name, args.work.absolute(), args.items)
    found, headers = {}, []
    for name in args.models:
        directory = args.work / "evals" / name
        if directory.is_dir():
            found[name] = scores(directory)
            headers.append(json.loads((directory / "run.json").read_text()))
    if not found:
        sys.exit(f"error: no evaluations in {args.work}.")
    notes = conditions(headers)
    OUT.mkdir(parents=True, exist_ok=True)
    if "base" in found:
        report(found, notes)
    if {"dms", "untrained"} <= set(found):
        about = ", ".join(f"{key}: {value}" for key, value in notes.items())
        lines = [
            *dms_page(found),
            "",
            f"Written by `python tools/results.py`; {about}.",
        ]
        (OUT / "dms.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
