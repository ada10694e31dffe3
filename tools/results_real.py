"""The page of real tolerance: SmolLM2 before and after training, what was claimed."""

from collections.abc import Mapping

from results_pages import REAL

from kvjax.eval.report.comparison import (
    Claim,
    Measured,
    by_model,
    cells_table,
    claims_table,
    costs_table,
    full_table,
    losses_by_model,
    perplexity_table,
)
from kvjax.eval.report.comparison.gap import GAP
from kvjax.eval.report.comparison.measured import CellKey, ModelScores

DRAWN = REAL
EVICTION = ("snapkv",)

CLAIMS = (
    Claim(title="snapkv, keep 1/4", bar=0.5, compressions=EVICTION, keep=0.25),
    Claim(title="snapkv, keep 1/2", compressions=EVICTION, keep=0.5),
    Claim(title="snapkv, keep 1/8", compressions=EVICTION, keep=0.125),
    Claim(title="2 bits, no residual", bar=0.6, compressions=("kivi_2bit",)),
)

GATES = {"surrogate": "snapkv"}
"""The score of trained gates is compared with the base model under SnapKV."""

ABOUT = {
    "smollm2": "*untouched*: SmolLM2-135M-Instruct as `kvjax fetch smollm2` gets it "
    "(4-bit weights of the package index)",
    "smollm2-tolerant": "*tolerant*: LoRA of rank 16 under sampled eviction and 2-bit "
    "codes, distilled from itself with a full cache (recipe `smollm2_tolerant`)",
    "smollm2-control": "*control*: the same rows and steps by the next token, nothing "
    "compressed; its contexts follow the untouched model, too",
    "smollm2-surrogate": "*gates*: a network beside each layer whose scores stand in "
    "the place of SnapKV's, the model as it was but for its rounding to "
    "bfloat16 in the file (recipe `smollm2_surrogate`)",
}

TITLES = {
    "smollm2": "untouched",
    "smollm2-tolerant": "tolerant",
    "smollm2-control": "control",
    "smollm2-surrogate": "gates",
}


def scores(evaluations: Mapping[str, Measured]) -> ModelScores:
    """Scores of tasks per model; those of texts are perplexities elsewhere."""
    every = by_model(evaluations, {})
    texts = losses_by_model(evaluations)
    return {
        name: {
            _renamed(cell): x for cell, x in cells.items() if cell not in texts[name]
        }
        for name, cells in every.items()
    }


def _renamed(cell: CellKey) -> CellKey:
    task, visibility, compression, keep = cell
    return task, visibility, GATES.get(compression, compression), keep


def page(evaluations: Mapping[str, Measured]) -> list[str]:
    """Lines of the page; `evaluations` are finished, the base model's among them."""
    models = scores(evaluations)
    titles = [TITLES[name] for name in models]
    base = models["smollm2"]
    pairs = {
        TITLES[name]: (base, cells)
        for name, cells in models.items()
        if name != "smollm2"
    }
    return [
        "# A real model that tolerates compression",
        "",
        *(f"- {ABOUT[name]}." for name in models),
        *(f"- {ABOUT[name]}: not measured yet." for name in REAL if name not in models),
        "",
        "Items, and the novel in whose sentences needles are hidden, are not those of "
        "the training; of WikiText-2 it saw the validation split, other articles than "
        "those of the test split. SnapKV's window is 16 tokens, as in the training.",
        "",
        "A gap is what compression costs the untouched model in one cell (a task, "
        "question hidden or seen, a method, a budget), where that is at least "
        f"{100 * GAP:.0f} points; *closed* is the share of it that the other model "
        "gets back, averaged over cells; below 0, it lost more.",
        "",
        *claims_table(CLAIMS, pairs),
        "",
        "What compression takes from each model of what that model does without, over "
        "the same cells. A model that was trained on such rows does better at them "
        "with and without compression, and by that alone closes a gap of the untouched "
        "one; what it loses itself says how much it tolerates.",
        "",
        *costs_table(
            CLAIMS, TITLES["smollm2"], dict(zip(titles, models.values(), strict=True))
        ),
        "",
        "![before and after](real_tolerance.svg)",
        "",
        "## Without compression",
        "",
        *full_table(models, titles),
        "",
        "## Perplexity",
        "",
        "Of 127 tokens behind 512, which are compressed before anything is known of "
        "what follows: WikiText-2's test split, and the novel that was held out.",
        "",
        *perplexity_table(losses_by_model(evaluations), titles),
        "",
        "## Cells",
        "",
        *cells_table(models, titles),
    ]
