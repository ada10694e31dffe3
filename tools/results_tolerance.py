"""The page of tolerance: what was claimed, what came out, drawn."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping

from results_pages import Cell, Found

EVICTION = ("snapkv", "tova", "h2o", "knorm", "chunkkv")
OTHER_SCORES = ("expected_attention", "keydiff", "lagkv")
LEFT_OUT = (*OTHER_SCORES, "pyramidkv", "adakv_snapkv")
"""The last two spread SnapKV's scores, which training knows, over layers and heads."""
LEFT_OUT_KEEP = 0.1875
ONE_BIT = "kivi_2bit, 1-bit values"
GAP = 0.10
"""Cells in which compression costs the base model less say nothing of a gap closed."""

PAIRS: Mapping[str, tuple[str, str]] = {
    "tolerant": ("base", "tolerant"),
    "seed 1": ("base-seed1", "tolerant-seed1"),
    "control": ("base", "control"),
    "control, seed 1": ("base-seed1", "control-seed1"),
}
"""Columns: which model is compared with which."""

TITLES = {
    f"{name}-seed1": f"{name}, seed 1" for name in ("base", "tolerant", "control")
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


def _of(*names: str, keep: float | None) -> Callable[[Cell], bool]:
    return lambda cell: cell[2] in names and cell[3] == keep


def claims() -> Iterable[tuple[str, float, Callable[[Cell], bool]]]:
    """What is claimed, its bar (NaN: none of its own), and the cells it is about."""
    yield "eviction, keep 1/4", 0.7, _of(*EVICTION, keep=0.25)
    yield "eviction, keep 1/8", 0.5, _of(*EVICTION, keep=0.125)
    yield "2 bits, no residual", 0.8, _of("kivi_2bit", keep=None)
    yield "2-bit keys, 1-bit values", 0.8, _of(ONE_BIT, keep=None)
    yield "keep 1/4 and 2 bits", 0.6, _of("snapkv_kivi", keep=0.25)
    yield "budget left out, 3/16", 0.4, _of(*EVICTION, keep=LEFT_OUT_KEEP)
    for keep, fraction in ((0.25, "1/4"), (0.125, "1/8")):
        yield f"methods left out, keep {fraction}", 0.4, _of(*LEFT_OUT, keep=keep)
        other = _of(*OTHER_SCORES, keep=keep)
        yield f"those with other scores, keep {fraction}", math.nan, other


def scores_by_model(found: Mapping[str, Found]) -> dict[str, dict[Cell, float]]:
    """Accuracies per model, those of 1-bit values among them."""
    out: dict[str, dict[Cell, float]] = {}
    for name, one in found.items():
        config, _, model = name.partition("-")
        cells = out.setdefault(model, {})
        for (task, seen, compression, keep), value in one.scores.items():
            if config != "one_bit":
                cells[task, seen, compression, keep] = value
            elif compression == "kivi_2bit":
                cells[task, seen, ONE_BIT, keep] = value
    return out


def tolerance_page(
    found: Mapping[str, Found], bounds: Mapping[float, float]
) -> list[str]:
    """Lines of the page.

    Args:
        found: finished evaluations, that of the base model among them.
        bounds: of `results_bound.streaming_bounds`.
    """
    models = scores_by_model(found)
    pairs = {
        title: (models[base], models[tuned])
        for title, (base, tuned) in PAIRS.items()
        if base in models and tuned in models
    }
    return [
        "# Tolerance",
        "",
        "A gap is what compression costs the base model in one cell (a task, an arm of "
        f"visibility, a method, a budget), where that is at least {100 * GAP:.0f} "
        "points; *closed* is the share of it that the tuned model gets back, averaged "
        "over cells; below 0, it lost more. `tolerant` is the recipe of that name, "
        "`seed 1` the same for another base model and seed. Of the methods left out, "
        "`pyramidkv` (beta 2) and `lagkv` (blocks of 32) are sized for these prompts. "
        + (
            "`control` had the same steps without compression."
            if "control" in pairs
            else "The control, the same steps without compression, has not been run."
        ),
        "",
        *_claims_table(pairs),
        "",
        "![before and after](tolerance.svg)",
        "",
        "## Method by method",
        "",
        *_methods_table(pairs),
        "",
        "## Without compression",
        "",
        *_tax_table(models),
        "",
        "## StreamingLLM, question hidden, recall",
        "",
        "Nobody knows which record will be asked for, and only the newest stay: "
        "*bound* is the share of items whose record is kept whole. It is not averaged "
        "above.",
        "",
        *_streaming_table(models, bounds),
        "",
        "## Cells",
        "",
        *_cells_table(models),
    ]


Pairs = Mapping[str, tuple[Mapping[Cell, float], Mapping[Cell, float]]]


def _claims_table(pairs: Pairs) -> list[str]:
    lines = [
        "| claim | bar, % | "
        + " | ".join(f"{title}: closed, %" for title in pairs)
        + " | before, after, full | cells |",
        "|---|---:|" + "---:|" * len(pairs) + "---|---:|",
    ]
    for title, bar, chosen in claims():
        each = [closed(base, tuned, chosen) for base, tuned in pairs.values()]
        if not any(one.cells for one in each):
            continue
        first = each[0]
        lines.append(
            f"| {title} | {_percent(bar, 0)} | "
            + " | ".join(_percent(one.share, 0) for one in each)
            + f" | {_percent(first.before)}, {_percent(first.after)}, "
            f"{_percent(first.full)} | {first.cells} |"
        )
    return lines


def _methods_table(pairs: Pairs) -> list[str]:
    keeps = (0.25, LEFT_OUT_KEEP, 0.125)
    heads = [f"{title}, {keep:g}" for title in pairs for keep in keeps]
    lines = [
        "| method | trained with | " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * len(heads),
    ]
    for name in (*EVICTION, "snapkv_kivi", "streaming_llm", *LEFT_OUT):
        shares = [
            closed(base, tuned, _of(name, keep=keep)).share
            for base, tuned in pairs.values()
            for keep in keeps
        ]
        known = "yes" if name in (*EVICTION, "snapkv_kivi") else "no"
        shown = " | ".join(f"{_percent(share, 0)}" for share in shares)
        lines.append(f"| {name} | {known} | {shown} |")
    return lines


def _tax_table(models: Mapping[str, Mapping[Cell, float]]) -> list[str]:
    lines = [
        "| task | " + " | ".join(TITLES.get(name, name) for name in models) + " |",
        "|---|" + "---:|" * len(models),
    ]
    for task in dict.fromkeys(cell[0] for cell in models["base"]):
        cell = (task, "query_agnostic", "none", None)
        values = [models[name].get(cell, math.nan) for name in models]
        lines.append(f"| {task} | {' | '.join(map(_percent, values))} |")
    return lines


def _streaming_table(
    models: Mapping[str, Mapping[Cell, float]], bounds: Mapping[float, float]
) -> list[str]:
    lines = [
        "| keep | bound | "
        + " | ".join(TITLES.get(name, name) for name in models)
        + " |",
        "|---:|---:|" + "---:|" * len(models),
    ]
    for keep, bound in bounds.items():
        cell = ("recall", "query_agnostic", "streaming_llm", keep)
        values = [models[name].get(cell, math.nan) for name in models]
        shown = " | ".join(map(_percent, (bound, *values)))
        lines.append(f"| {keep:g} | {shown} |")
    return lines


def _cells_table(models: Mapping[str, Mapping[Cell, float]]) -> list[str]:
    lines = [
        "| task | visibility | compression | keep | "
        + " | ".join(TITLES.get(name, name) for name in models)
        + " |",
        "|---|---|---|---:|" + "---:|" * len(models),
    ]
    every = dict.fromkeys(cell for cells in models.values() for cell in cells)
    for cell in sorted(every, key=lambda one: (*one[:3], one[3] or 0.0)):
        task, visibility, compression, keep = cell
        values = [models[name].get(cell) for name in models]
        shown = " | ".join("" if v is None else _percent(v) for v in values)
        kept = "" if keep is None else f"{keep:g}"
        lines.append(f"| {task} | {visibility} | {compression} | {kept} | {shown} |")
    return lines


def _percent(share: float, digits: int = 1) -> str:
    return "" if math.isnan(share) else f"{100 * share:.{digits}f}"
