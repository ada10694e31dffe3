"""The pages of docs/results/: what was claimed, what came out, drawn."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

EVICTION = ("snapkv", "tova", "h2o", "knorm", "chunkkv")
LEFT_OUT = ("expected_attention", "keydiff", "lagkv", "pyramidkv", "adakv_snapkv")
LEFT_OUT_KEEP = 0.1875
GAP = 0.10
"""Cells in which compression costs the base model less say nothing of a gap closed."""

Cell = tuple[str, str, str, float | None]
"""Task, visibility, compression, keep."""


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


def conditions(headers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How evaluations were run, by their `run.json`; all values where they differ."""
    rows = [
        {
            "items per cell": header["config"]["items"],
            "tokens": " ".join(map(str, header["config"]["lengths"])),
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


def dms_page(found: Mapping[str, Mapping[Cell, float]]) -> list[str]:
    """What DMS gives up, beside methods without training at the same bytes."""
    ours, base = found["dms"], found["untrained"]
    columns = [("full, base", base, "none", None)]
    columns += [(f"dms, {keep:g}", ours, "dms", keep) for keep in (0.25, 0.125)]
    columns += [
        (f"{name}, {keep:g}, base", base, name, keep)
        for name in ("h2o", "tova")
        for keep in (0.25, 0.125)
    ]
    columns += [("full, dms", ours, "none", None)]
    lines = [
        "# DMS",
        "",
        "Accuracy in percent: the bundled `kvjax-tiny-dms` under `dms`, and "
        "`kvjax-tiny` (base) under methods without training, at the same slots per "
        "layer. *full, dms* is the trained model with every token visible, for which "
        "it was not trained.",
        "",
        "| task | visibility | " + " | ".join(c[0] for c in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for task, visibility in dict.fromkeys(cell[:2] for cell in ours):
        values = [
            cells.get((task, visibility, name, keep))
            for _, cells, name, keep in columns
        ]
        shown = " | ".join("" if v is None else f"{100 * v:.1f}" for v in values)
        lines.append(f"| {task} | {visibility} | {shown} |")
    return lines
