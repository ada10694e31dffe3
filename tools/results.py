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
import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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
    """

    recipe: str = ""
    sets: tuple[str, ...] = ()
    evaluation: str = "tolerance"


MODELS: Mapping[str, Model] = {
    "base": Model(),
    "tolerant": Model(recipe="tolerant"),
    "control": Model(recipe="tolerant", sets=("sampling.choices=[]",)),
    "dms": Model(recipe="dms", evaluation="dms"),
    "dms_immediate": Model(
        recipe="dms", sets=("dms.window=1",), evaluation="dms_immediate"
    ),
}

EVICTION = ("snapkv", "tova", "h2o", "knorm", "chunkkv")
LEFT_OUT = ("expected_attention", "keydiff", "lagkv", "pyramidkv", "adakv_snapkv")
LEFT_OUT_KEEP = 0.1875
GAP = 0.10
"""Cells in which compression costs the base model less say nothing of a gap closed."""

Cell = tuple[str, str, str, float | None]
"""Task, visibility, compression, keep."""


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
    )
    return out


def scores(directory: pathlib.Path) -> dict[Cell, float]:
    """Accuracy of every finished cell."""
    from kvjax.eval.results import load_rows

    return {
        (row["task"], row["visibility"], row["compression"], row["keep"]): row["score"]
        for row in load_rows(directory).to_pylist()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Closed:
    """How much of what compression costs the base model a tuned one gets back.

    Attributes:
        share: mean over the cells with a gap of at least `GAP`; NaN without any.
        cells: how many those are.
        before, after: mean accuracy over them.
        full: of the base model without compression.
    """

    share: float
    cells: int
    before: float
    after: float
    full: float


def closed(
    base: Mapping[Cell, float],
    tuned: Mapping[Cell, float],
    chosen: Callable[[Cell], bool],
) -> Closed:
    """`Closed` over the cells that `chosen` picks."""
    rows = []
    for cell, before in base.items():
        task, visibility, _, _ = cell
        full = base.get((task, visibility, "none", None))
        if full is None or cell not in tuned or not chosen(cell):
            continue
        if full - before >= GAP:
            gained = (tuned[cell] - before) / (full - before)
            rows.append((gained, before, tuned[cell], full))
    if not rows:
        return Closed(share=math.nan, cells=0, before=0, after=0, full=0)
    share, before, after, full = map(statistics.fmean, zip(*rows, strict=True))
    return Closed(share=share, cells=len(rows), before=before, after=after, full=full)


def claims() -> Iterable[tuple[str, float, Callable[[Cell], bool]]]:
    """What is claimed, its bar, and the cells it is about."""

    def of(names: Sequence[str], keep: float | None) -> Callable[[Cell], bool]:
        return lambda cell: cell[2] in names and cell[3] == keep

    yield "eviction, keep 1/4", 0.7, of(EVICTION, 0.25)
    yield "eviction, keep 1/8", 0.5, of(EVICTION, 0.125)
    yield "2 bits, no residual", 0.8, of(("kivi_2bit",), None)
    yield "keep 1/4 and 2 bits", 0.6, of(("snapkv_kivi",), 0.25)
    yield "budget left out, 3/16", 0.4, of(EVICTION, LEFT_OUT_KEEP)
    yield "methods left out, keep 1/4", 0.4, of(LEFT_OUT, 0.25)
    yield "methods left out, keep 1/8", 0.4, of(LEFT_OUT, 0.125)


def tolerance(found: Mapping[str, Mapping[Cell, float]]) -> list[str]:
    """Lines of the page that are about `tolerant` and `control`."""
    base = found["base"]
    tuned = [name for name in ("tolerant", "control") if name in found]
    lines = [
        "| claim | bar | "
        + " | ".join(f"{name}: closed | before, after, full" for name in tuned)
        + " | cells |",
        "|---|---:|" + "---:|---|" * len(tuned) + "---:|",
    ]
    for title, bar, chosen in claims():
        each = [closed(base, found[name], chosen) for name in tuned]
        shown = [
            f"{100 * c.share:.0f} % | {100 * c.before:.1f}, {100 * c.after:.1f}, "
            f"{100 * c.full:.1f}"
            for c in each
        ]
        cells = each[0].cells if each else 0
        lines.append(f"| {title} | {100 * bar:.0f} % | {' | '.join(shown)} | {cells} |")
    lines += ["", "| uncompressed | " + " | ".join(["base", *tuned]) + " |"]
    lines += ["|---|" + "---:|" * (1 + len(tuned))]
    tasks = dict.fromkeys(cell[0] for cell in base)
    for task in tasks:
        cell = (task, "query_agnostic", "none", None)
        values = [found[name].get(cell, math.nan) for name in ("base", *tuned)]
        shown = " | ".join(f"{100 * value:.1f}" for value in values)
        lines.append(f"| {task} | {shown} |")
    return lines


def cells_table(found: Mapping[str, Mapping[Cell, float]]) -> list[str]:
    """Every cell of every model, in percent."""
    names = list(found)
    lines = [
        "| task | visibility | compression | keep | " + " | ".join(names) + " |",
        "|---|---|---|---:|" + "---:|" * len(names),
    ]
    every = dict.fromkeys(cell for name in names for cell in found[name])
    for cell in every:
        task, visibility, compression, keep = cell
        values = [found[name].get(cell) for name in names]
        shown = " | ".join("" if v is None else f"{100 * v:.1f}" for v in values)
        kept = "" if keep is None else f"{keep:g}"
        lines.append(f"| {task} | {visibility} | {compression} | {kept} | {shown} |")
    return lines


def plot(found: Mapping[str, Mapping[Cell, float]], path: pathlib.Path) -> None:
    """Accuracy against the kept fraction, before and after, one panel per method."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "kvjax"
    names = [name for name in ("base", "control", "tolerant") if name in found]
    figure, axes = plt.subplots(
        2, len(EVICTION), figsize=(2.3 * len(EVICTION), 4.4), sharex=True, sharey=True
    )
    for row, visibility in enumerate(("query_agnostic", "query_aware")):
        for axis, method in zip(axes[row], EVICTION, strict=True):
            for name in names:
                keeps, values = curve(found[name], visibility, method)
                axis.plot(keeps, values, marker="o", markersize=3, label=name)
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 0.25, 0.125], ["1", "1/4", "1/8"])
            axis.set_title(method if row == 0 else "", fontsize=9)
        hidden = visibility == "query_agnostic"
        axes[row][0].set_ylabel("question hidden" if hidden else "question seen")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.supxlabel("fraction of the cache kept", fontsize=9)
    figure.suptitle("Mean accuracy over tasks (percent)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def curve(
    found: Mapping[Cell, float], visibility: str, method: str
) -> tuple[list[float], list[float]]:
    """Kept fractions and mean accuracies, the full cache first."""
    points: dict[float, list[float]] = {}
    for (_, seen, name, keep), value in found.items():
        if seen == visibility and name in (method, "none"):
            points.setdefault(1.0 if keep is None else keep, []).append(100 * value)
    keeps = sorted(points, reverse=True)
    return keeps, [statistics.fmean(points[keep]) for keep in keeps]


def report(found: Mapping[str, Mapping[Cell, float]], notes: Mapping[str, Any]) -> None:
    """Write docs/results/: the page, its figure and the numbers."""
    OUT.mkdir(parents=True, exist_ok=True)
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
        "over cells. `control` had the same steps without compression.",
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
    """Parse the command line, do what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "results")
    parser.add_argument("--items", type=int, help="per cell, instead of 500")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    if not args.report_only:
        for name in args.models:
            evaluate(name, args.work.absolute(), args.items)
    found = {}
    for name in args.models:
        directory = args.work / "evals" / name
        if directory.is_dir():
            found[name] = scores(directory)
    if "base" not in found:
        sys.exit(f"error: no evaluation of the base model in {args.work}.")
    header = json.loads((args.work / "evals" / "base" / "run.json").read_text())
    config = header["config"]
    report(found, {"items per cell": config["items"], "tokens": config["lengths"][0]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
