"""The page of tolerance: what was claimed, what came out, drawn."""

import math
from collections.abc import Mapping

from results_pages import TOLERANCE

import kvjax
from kvjax.eval.report.comparison import (
    Claim,
    Measured,
    bound_table,
    by_model,
    cells_table,
    claims_table,
    full_table,
    methods_table,
    recency_bounds,
)
from kvjax.eval.report.comparison.gap import GAP
from kvjax.eval.report.comparison.measured import ModelScores
from kvjax.scorers import StreamingLLM

EVICTION = ("snapkv", "tova", "h2o", "knorm", "chunkkv")
OTHER_SCORES = ("expected_attention", "keydiff", "lagkv")
LEFT_OUT = (*OTHER_SCORES, "pyramidkv", "adakv_snapkv")
"""The last two spread SnapKV's scores, which training knows, over layers and heads."""
LEFT_OUT_KEEP = 0.1875
TRAINED = (*EVICTION, "snapkv_kivi")
ONE_BIT = "kivi_2bit, 1-bit values"
RENAMED = {"one_bit": {"kivi_2bit": ONE_BIT}}
"""Its other rows are those of the configuration `tolerance` again."""

PAIRS: Mapping[str, tuple[str, str]] = {
    "tolerant": ("base", "tolerant"),
    "seed 1": ("base-seed1", "tolerant-seed1"),
    "control": ("base", "control"),
    "control, seed 1": ("base-seed1", "control-seed1"),
}
"""Columns: which model is compared with which."""

DRAWN = ("base", "control", "tolerant")
"""Models in the order of the figure's colors."""

TITLES = {f"{name}-seed1": f"{name}, seed 1" for name in TOLERANCE}

CLAIMS = (
    Claim(title="eviction, keep 1/4", bar=0.7, compressions=EVICTION, keep=0.25),
    Claim(title="eviction, keep 1/8", bar=0.5, compressions=EVICTION, keep=0.125),
    Claim(title="2 bits, no residual", bar=0.8, compressions=("kivi_2bit",)),
    Claim(title="2-bit keys, 1-bit values", bar=0.8, compressions=(ONE_BIT,)),
    Claim(
        title="keep 1/4 and 2 bits", bar=0.6, compressions=("snapkv_kivi",), keep=0.25
    ),
    Claim(
        title="budget left out, 3/16",
        bar=0.4,
        compressions=EVICTION,
        keep=LEFT_OUT_KEEP,
    ),
    *(
        Claim(title=f"{what}, keep {share}", bar=bar, compressions=names, keep=keep)
        for keep, share in ((0.25, "1/4"), (0.125, "1/8"))
        for what, bar, names in (
            ("methods left out", 0.4, LEFT_OUT),
            ("those with other scores", math.nan, OTHER_SCORES),
        )
    ),
)


def scores(evaluations: Mapping[str, Measured]) -> ModelScores:
    """Accuracies per model, those of 1-bit values among them."""
    return by_model(evaluations, RENAMED)


def bounds(evaluations: Mapping[str, Measured]) -> dict[float, float]:
    """By fraction kept, what may be known behind StreamingLLM."""
    evict = kvjax.compression("streaming_llm").evict
    assert evict is not None and isinstance(evict.score, StreamingLLM)
    return recency_bounds(evaluations["tolerance-base"].header, evict.score.n_sink)


def page(evaluations: Mapping[str, Measured]) -> list[str]:
    """Lines of the page; `evaluations` are finished, the base model's among them."""
    models = scores(evaluations)
    titles = [TITLES.get(name, name) for name in models]
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
        *claims_table(CLAIMS, pairs),
        "",
        "![before and after](tolerance.svg)",
        "",
        "## Method by method",
        "",
        *methods_table(
            (*TRAINED, "streaming_llm", *LEFT_OUT),
            TRAINED,
            (0.25, LEFT_OUT_KEEP, 0.125),
            pairs,
        ),
        "",
        "## Without compression",
        "",
        *full_table(models, titles),
        "",
        "## StreamingLLM, question hidden, recall",
        "",
        "Nobody knows which record will be asked for, and only the newest stay: "
        "*bound* is the share of items whose record is kept whole. It is not averaged "
        "above.",
        "",
        *bound_table(models, titles, bounds(evaluations), "recall", "streaming_llm"),
        "",
        "## Cells",
        "",
        *cells_table(models, titles),
    ]
