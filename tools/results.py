"""Train what makes models tolerant, measure it, write docs/results/: `make results`.

    python tools/results.py                          everything, many hours on two cores
    python tools/results.py --pages dms duo          these pages alone
    python tools/results.py --models base tolerant   what these models are needed for
    python tools/results.py --items 50 --report-only

Everything is kept under `--work` and goes on where it stopped: checkpoints of runs,
exported models, finished cells of evaluations. What `--work` lacks of a page is taken
from the numbers of its last version, `docs/results/PAGE.json`.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

from results_bound import streaming_bounds
from results_pages import SEEDS, Cell, Found, conditions, score_tables
from results_plots import plot_bytes, plot_tolerance
from results_store import read, write
from results_tolerance import tolerance_page

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the comparison.

    Attributes:
        recipe: of `configs/train/`, or empty for a bundled model.
        name: of the bundled model.
        sets: changes to the recipe.
    """

    recipe: str = ""
    name: str = "kvjax-tiny"
    sets: tuple[str, ...] = ()


SEED1 = ("init=kvjax-tiny-seed1", "seed=1")

MODELS: Mapping[str, Model] = {
    "base": Model(),
    "base-seed1": Model(name="kvjax-tiny-seed1"),
    "tolerant": Model(recipe="tolerant"),
    "tolerant-seed1": Model(recipe="tolerant", sets=SEED1),
    "control": Model(recipe="tolerant", sets=("sampling.choices=[]",)),
    "control-seed1": Model(recipe="tolerant", sets=("sampling.choices=[]", *SEED1)),
    "dms": Model(recipe="dms"),
    "dms-seed1": Model(recipe="dms", sets=SEED1),
    "dms-immediate": Model(recipe="dms", sets=("dms.window=1",)),
    "dms-immediate-seed1": Model(recipe="dms", sets=("dms.window=1", *SEED1)),
    "duo": Model(recipe="duo"),
    "duo-seed1": Model(recipe="duo", sets=SEED1),
    "surrogate": Model(recipe="surrogate"),
    "surrogate-seed1": Model(recipe="surrogate", sets=SEED1),
    "matryoshka": Model(recipe="matryoshka"),
    "matryoshka-start": Model(
        recipe="matryoshka",
        sets=("stages.0.steps=1", "optimizer.learning_rate=1.0e-9"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model under an evaluation of `configs/eval/`, with more options."""

    model: str
    config: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.config}-{self.model}"


TOLERANCE = ("base", "tolerant", "control")
PAGES: Mapping[str, tuple[Evaluation, ...]] = {
    "tolerance": tuple(
        Evaluation(model=f"{model}{seed}", config=config)
        for config in ("tolerance", "one_bit", "transfer")
        for seed in SEEDS
        for model in TOLERANCE
    ),
    "dms": tuple(
        Evaluation(model=f"{model}{seed}", config="dms", options=options)
        for seed in SEEDS
        for model, options in (
            ("dms", ("--compression", "dms")),
            ("dms-immediate", ("--compression", "dms", "--set", "window=1")),
            ("base", ("--compression", "h2o,tova")),
        )
    ),
    "duo": tuple(Evaluation(model=f"duo{seed}", config="duo") for seed in SEEDS),
    "surrogate": tuple(
        Evaluation(model=f"surrogate{seed}", config="surrogate") for seed in SEEDS
    ),
    "matryoshka": tuple(
        Evaluation(model=m, config="matryoshka")
        for m in ("matryoshka", "matryoshka-start")
    ),
}


def run(*command: object) -> None:
    """Run a command; its failure is ours."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT)


def model_path(name: str, work: pathlib.Path) -> str:
    """The trained model, made unless it is there."""
    model = MODELS[name]
    if not model.recipe:
        return model.name
    run_dir = work / "runs" / name
    if not (run_dir / "model" / "config.json").is_file():
        sets = [word for text in model.sets for word in ("--set", text)]
        given = ("--config", model.recipe, *sets, "--out", run_dir)
        run(sys.executable, "-m", "kvjax.cli", "finetune", *given)
    return str(run_dir / "model")


def evaluate(it: Evaluation, work: pathlib.Path, items: int | None) -> None:
    """Measure a model, unless that is done."""
    more = () if items is None else ("--items", items)
    run(
        *(sys.executable, "-m", "kvjax.cli", "eval"),
        *("--config", ROOT / "configs" / "eval" / f"{it.config}.yaml"),
        *("--model", model_path(it.model, work)),
        *("--out", work / "evals" / it.name, *more, "--dtype", "float32"),
        *it.options,
    )


def is_whole(one: Found) -> bool:
    """Whether every task and arm of its configuration has the same columns."""
    config = one.header["config"]
    groups = {
        (task["label"] or task["name"], arm)
        for task in config["tasks"]
        for arm in task["visibility"] or config["visibility"]
    }
    columns = [{c[2:] for c in one.scores if c[:2] == group} for group in groups]
    return all(column and column == columns[0] for column in columns)


def found(page: str, work: pathlib.Path) -> dict[str, Found]:
    """The finished evaluations of a page, by their names, in the page's order."""
    from kvjax.eval.results import load_rows

    out = read(OUT / f"{page}.json")
    for it in PAGES[page]:
        directory = work / "evals" / it.name
        if not (directory / "run.json").is_file():
            continue
        rows = load_rows(directory).to_pylist()
        cells: dict[Cell, dict] = {
            (row["task"], row["visibility"], row["compression"], row["keep"]): row
            for row in rows
        }
        one = Found(
            scores={cell: row["score"] for cell, row in cells.items()},
            bytes={cell: row["resident_bytes"] for cell, row in cells.items()},
            header=json.loads((directory / "run.json").read_text(encoding="utf-8")),
        )
        if not is_whole(one):
            print(f"{directory} is not finished: the page keeps what it had of it.")
            continue
        out[it.name] = one
    return {it.name: out[it.name] for it in PAGES[page] if it.name in out}


def page_text(page: str, of: Mapping[str, Found]) -> str:
    """What `docs/results/PAGE.md` says."""
    notes = conditions([one.header for one in of.values()])
    said = (
        "Written by `python tools/results.py` (`make results`); do not edit. "
        + ", ".join(f"{key}: {value}" for key, value in notes.items())
        + "."
    )
    if page == "tolerance":
        lines = tolerance_page(of, streaming_bounds(of["tolerance-base"].header))
    else:
        figure = ("", f"![accuracy against bytes]({page}.svg)")
        lines = [*score_tables(page, of), *figure]
    lines[1:1] = ["", said]
    return "\n".join(lines) + "\n"


def write_page(page: str, of: Mapping[str, Found]) -> None:
    """Write `docs/results/PAGE.md`, its numbers and its figure."""
    (OUT / f"{page}.md").write_text(page_text(page, of), encoding="utf-8")
    write(OUT / f"{page}.json", of)
    figure = OUT / f"{page}.svg"
    if page == "tolerance":
        plot_tolerance(of, figure)
    else:
        plot_bytes(page, of, figure)


def main() -> int:
    """Parse the command line, do what is missing, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", nargs="+", default=list(PAGES), choices=PAGES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "results")
    parser.add_argument("--items", type=int, help="per cell, instead of 500")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    work = args.work.absolute()
    if not args.report_only:
        for page in args.pages:
            for it in PAGES[page]:
                if it.model in args.models:
                    evaluate(it, work, args.items)
    OUT.mkdir(parents=True, exist_ok=True)
    written = 0
    for page in args.pages:
        of = found(page, work)
        first = PAGES[page][0].name
        if first in of:
            write_page(page, of)
            written += 1
    if not written:
        sys.exit(f"error: no evaluations in {work} that a page could be made of.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
