"""A cache that answers several questions: accuracy by question, bytes, time to answer.

Questions follow each other in a session, right replies between them. The context is
compressed once: in front of the first question, or behind it, where scores see it
(`query_aware`) and keep what that one needs. Writes `results/second_question.json` and
the figure of docs/sharing.md.
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


def rows_of(args, model, tokenizer) -> list[dict[str, Any]]:
    """All cells of the evaluation."""
    config = decode_config(
        {
            "model": args.model,
            "compressions": args.methods,
            "keeps": [args.keep],
            "visibility": [AWARE, AGNOSTIC],
            "tasks": [{"name": args.task, "turns": args.turns, "mode": "session"}],
            "lengths": [args.length],
            "items": args.items,
            "batch": args.batch,
            "window": args.window,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        return harness.run(model, tokenizer, config, folder)


def figure(rows: list[dict[str, Any]], title: str) -> Figure:
    """Accuracy by question, a line for each method and what its score saw."""
    made = new_figure(6.2, 3.4)
    axes = made.add_subplot()
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["compression"] == "random" or (
            row["compression"] == "none" and row["visibility"] == AWARE
        ):
            continue
        seen = "sees question 1" if row["visibility"] == AWARE else "sees no question"
        name = row["compression"]
        keep = "" if row["keep"] is None else f", keep {row['keep']:g}, {seen}"
        lines.setdefault("full cache" if name == "none" else name + keep, []).append(
            row
        )
    for (name, mine), color, marker in zip(
        lines.items(), PALETTE * 2, MARKERS * 2, strict=False
    ):
        turns = [row["turn"] for row in mine]
        score = [100 * row["score"] for row in mine]
        error = [100 * row["score_se"] for row in mine]
        how = {"color": color, "marker": marker, "capsize": 2.5, "label": name}
        axes.errorbar(turns, score, yerr=error, **how)
    axes.set_xticks(sorted({row["turn"] for row in rows}))
    axes.set_xlabel("question of the same compressed context")
    axes.set_ylabel("right answers (%)")
    axes.set_ylim(-3, 103)
    axes.set_title(title)
    axes.legend(fontsize=8, frameon=False)
    return made


def main() -> int:
    args = arguments(
        __doc__,
        methods=["snapkv", "tova"],
        model="kvjax-tiny",
        task="recall",
        keep=0.25,
        turns=4,
        items=100,
        length=512,
        batch=50,
        window=8,
    )
    model, tokenizer = load(model_directory(args.model), "float32")
    rows = rows_of(args, model, tokenizer)
    title = f"{args.model}, {args.task}, {args.length} tokens"
    save_svg(figure(rows, title), FIGURE)
    names = ("compression", "keep", "visibility", "turn", "score", "score_se")
    costs = ("resident_bytes", "full_bytes", "prefill_ms", "compress_ms", "ask_ms")
    found = [{name: row[name] for name in (*names, *costs)} for row in rows]
    return report("second_question", vars(args), found)


if __name__ == "__main__":
    sys.exit(main())
