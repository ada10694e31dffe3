"""A cache that answers several questions: accuracy by question, bytes, time to answer.

Questions follow each other in a session, right replies between them. The context is
compressed once: in front of the first question, or behind it, where scores see it
(`query_aware`) and keep what that one needs. A question names its record to the last
character (`leak`), so that what it asks for can be seen; values have four, of which
the first question's cache is told one by the prompt's logits. Writes
`results/second_question.json` and the figure of docs/sharing.md.
"""

import pathlib
import sys
import tempfile
from typing import Any

from common import arguments, report
from matplotlib.figure import Figure

from kvjax.eval import harness
from kvjax.eval.config import decode_config
from kvjax.eval.report.style import MARKERS, PALETTE, new_figure, save_svg
from kvjax.models import load
from kvjax.models.bundled import model_directory

FIGURE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "second_question.svg"
AWARE, AGNOSTIC = "query_aware", "query_agnostic"
FIELDS = (
    "compression",
    "keep",
    "visibility",
    "turn",
    "score",
    "score_se",
    "resident_bytes",
    "full_bytes",
    "prefill_ms",
    "compress_ms",
    "ask_ms",
)


def rows_of(args, model: str, keep: float) -> list[dict[str, Any]]:
    """All cells of one model."""
    config = decode_config(
        {
            "model": model,
            "compressions": args.methods,
            "keeps": [keep],
            "visibility": [AWARE, AGNOSTIC],
            "tasks": [
                {
                    "name": "recall",
                    "turns": args.turns,
                    "mode": "session",
                    "fields": {"leak": True, "value_length": args.value_length},
                }
            ],
            "lengths": [args.length],
            "items": args.items,
            "batch": args.batch,
            "window": args.window,
        }
    )
    loaded = load(model_directory(model), "float32")
    with tempfile.TemporaryDirectory() as folder:
        rows = harness.run(*loaded, config, folder)
    return [{"model": model, **{name: row[name] for name in FIELDS}} for row in rows]


def figure(found: dict[str, list[dict[str, Any]]]) -> Figure:
    """Accuracy by question of each model: a line for each method and what it saw."""
    made = new_figure(9.6, 3.4)
    *panels, beside = made.subplots(1, len(found) + 1, sharey=True)
    for axes, (title, rows) in zip(panels, found.items(), strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            name, aware = row["compression"], row["visibility"] == AWARE
            if name == "random" or (name == "none" and aware):
                continue
            seen = "sees question 1" if aware else "sees none"
            label = "full cache" if name == "none" else f"{name}, {seen}"
            lines.setdefault(label, []).append(row)
        for (name, mine), color, marker in zip(
            sorted(lines.items()), PALETTE * 2, MARKERS * 2, strict=False
        ):
            turns = [row["turn"] for row in mine]
            score = [100 * row["score"] for row in mine]
            error = [100 * row["score_se"] for row in mine]
            how = {"color": color, "marker": marker, "capsize": 2.5, "label": name}
            axes.errorbar(turns, score, yerr=error, **how)
        axes.set_xticks(sorted({row["turn"] for row in rows}))
        axes.set_xlabel("question of the same compressed context")
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("right answers (%)")
    panels[0].set_ylim(-3, 103)
    handles, names = panels[0].get_legend_handles_labels()
    beside.axis("off")
    beside.legend(handles, names, loc="center left", frameon=False)
    return made


def main() -> int:
    args = arguments(
        __doc__,
        methods=["snapkv", "tova"],
        models=["kvjax-tiny", "kvjax-tiny-tolerant"],
        keeps=[0.25, 0.06],
        turns=4,
        items=200,
        value_length=4,
        length=512,
        batch=50,
        window=8,
    )
    found = {}
    for model, keep in zip(args.models, args.keeps, strict=True):
        found[f"{model}, keep {keep:g}"] = rows_of(args, model, keep)
    save_svg(figure(found), FIGURE)
    return report(
        "second_question", vars(args), [r for one in found.values() for r in one]
    )


if __name__ == "__main__":
    sys.exit(main())
