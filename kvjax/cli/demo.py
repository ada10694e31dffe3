"""`kvjax demo`."""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any, ClassVar, final

from rich.console import Console

from kvjax.cli.base import UI, Command, Items, Output
from kvjax.cli.evaluate import evaluate
from kvjax.cli.tables import print_gains, print_scores
from kvjax.eval.config import load_config
from kvjax.models.bundled import DEFAULT

TOLERANT = "kvjax-tiny-tolerant"
DMS = "kvjax-tiny-dms"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """A small evaluation of the bundled model, its report, and the model trained."""

    resumes: ClassVar[bool] = True
    summary: ClassVar[str] = "See what compression costs: a small evaluation, a report."
    presets: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax demo                 a few minutes on two CPU cores, then kept\n"
        "  kvjax demo --items 8       quicker and rougher\n"
        "\n"
        f"Runs the evaluation `demo` of the bundled model {DEFAULT}. Prints the\n"
        "scores, and writes a page that opens in any browser. Then the same of\n"
        f"{TOLERANT}, trained for small caches, and {DMS},\n"
        "which has learned what to give up."
    )

    items: Items = None
    """Questions per task and compression; more are slower and more certain."""
    out: pathlib.Path = pathlib.Path("results/demo")
    """Run directory; delete it to measure again."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        from kvjax.eval.report import write_report

        start, out = time.perf_counter(), self.out
        if not out.name or out.name == "..":  # what is beside `.`?
            out = out.resolve()
        config = load_config("demo")
        if self.items is not None:
            tasks = tuple(
                dataclasses.replace(task, items=min(task.items, self.items))
                if task.items
                else task
                for task in config.tasks
            )
            config = dataclasses.replace(config, items=self.items, tasks=tasks)
        rows, resumed, _ = evaluate(config, self.out, "auto", ui)
        others = {
            "tolerant": dataclasses.replace(config, model=TOLERANT),
            "dms": dataclasses.replace(
                config, model=DMS, compressions=("dms",), keeps=(0.25, 0.125)
            ),
        }
        trained = {}
        for name, other in others.items():
            beside = out.with_name(f"{out.name}-{name}")
            trained[name], again, _ = evaluate(other, beside, "auto", ui)
            resumed += again
        with ui.status("drawing the report"):
            page = write_report(self.out)
        return {
            "run": str(self.out),
            "report": str(page),
            "seconds": round(time.perf_counter() - start, 1),
            "resumed_cells": resumed,
            "rows": rows,
            "trained_rows": trained,
        }

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        print_scores(console, result["rows"])
        print(
            "agree: replies equal to the uncompressed model's, in %. KiB: what the "
            "cache of one\nprompt holds. Start at `none` (the ceiling) and "
            "`random` (the floor)."
        )
        print()
        trained = result["trained_rows"]
        print_gains(console, result["rows"], trained["tolerant"])
        print(f"{TOLERANT} was trained for this: kvjax finetune --config tolerant\n")
        own = [row for row in trained["dms"] if row["compression"] != "random"]
        print_scores(console, own)
        print(
            f"{DMS} says itself what it gives up, at as many slots as the others:\n"
            "kvjax finetune --config dms. With `none` it sees what it never saw then."
        )
        if result["resumed_cells"]:
            count = len(result["rows"]) + sum(map(len, trained.values()))
            print(
                f"{result['resumed_cells']} of {count} rows are of an earlier call; "
                f"delete {result['run']}* to measure again."
            )
        print(f"\nreport: {result['report']}  ({result['seconds']:.0f} s)")
