"""Train what makes models tolerant, measure it, write docs/results/: `make results`.

    python tools/results.py                          everything, many hours on two cores
    python tools/results.py --pages dms duo          these pages alone
    python tools/results.py --models base tolerant   what these models are needed for
    python tools/results.py --items 50 --report-only

Everything is kept under `--work` and goes on where it stopped: checkpoints of runs,
exported models, finished cells of evaluations. What `--work` lacks of a page is taken
from the numbers of its last version, `docs/results/PAGE.json`.

Models of words train on the texts of `lm/gutenberg` in the folder that KVJAX_DATA
names, all but the one that evaluations are about.
"""

import argparse
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import results_real
import results_tolerance
from results_pages import EVALUATIONS, MODELS, PAGES, Evaluation

from kvjax.eval.report import comparison
from kvjax.eval.report.comparison import Measured
from kvjax.eval.report.style import save_svg

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results"


HELD_OUT = "The-Adventures-of-Sherlock-Holmes_1661.txt"

OWN = {"tolerance": results_tolerance, "real_tolerance": results_real}
"""Pages that compare a model before and after training."""


def run(*command: object, **environment: str) -> None:
    """Run a command; its failure is ours."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, **environment})


def texts() -> pathlib.Path:
    """The folder of texts."""
    data = os.environ.get("KVJAX_DATA", "")
    if not (folder := pathlib.Path(data) / "lm" / "gutenberg").is_dir() or not data:
        sys.exit(
            "error: models of words need KVJAX_DATA, a folder with lm/gutenberg/*.txt, "
            f"{HELD_OUT} among them, and lm/wikitext-2/test.txt."
        )
    return folder


def training_data(work: pathlib.Path) -> pathlib.Path:
    """A folder of data as KVJAX_DATA names one, without the text that is held out.

    Beside it, in `texts`, is all that is trained on as text: with WikiText-2's
    validation split, whose test split is evaluated on.
    """
    made = work / "training_data"
    novels, everything = made / "lm" / "gutenberg", made / "texts"
    books = [it for it in texts().glob("*.txt") if it.name != HELD_OUT]
    articles = texts().parent / "wikitext-2" / "valid.txt"
    for folder, files in ((novels, books), (everything, [*books, articles])):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
    return made


def model_path(name: str, work: pathlib.Path) -> str:
    """The trained model, made unless it is there."""
    model = MODELS[name]
    if not model.recipe:
        return model.name
    run_dir = work / "runs" / name
    if not (run_dir / "model" / "config.json").is_file():
        sets, environment = model.sets, {}
        if model.texts:
            data = training_data(work)
            environment = {"KVJAX_DATA": str(data)}
            sets = (*sets, f"data.sources.0.dataset={data / 'texts'}")
        words = [word for text in sets for word in ("--set", text)]
        given = ("--config", model.recipe, *words, "--out", run_dir)
        run(sys.executable, "-m", "kvjax.cli", "finetune", *given, **environment)
    return str(run_dir / "model")


def evaluate(it: Evaluation, work: pathlib.Path, *more: object) -> None:
    """Measure a model, unless that is done."""
    options = it.options
    if any("{" in option for option in options):
        places = {"data": texts().parent.parent, "held_out": texts() / HELD_OUT}
        options = tuple(option.format(**places) for option in options)
    run(
        *(sys.executable, "-m", "kvjax.cli", "eval"),
        *("--config", ROOT / "configs" / "eval" / f"{it.config}.yaml"),
        *("--model", model_path(it.model, work)),
        *("--out", work / "evals" / it.name, *more, "--dtype", "float32"),
        *options,
    )


def page_text(name: str, found: Mapping[str, Measured]) -> str:
    """What `docs/results/NAME.md` says."""
    if name in OWN:
        title, *lines = OWN[name].page(found)
    else:
        page = PAGES[name]
        title, lines = f"# {page.title}", ["", page.text]
        lines += comparison.score_tables(page.columns, found)
        lines += ["", f"![accuracy against bytes]({name}.svg)"]
    how = comparison.conditions([one.header for one in found.values()])
    note = (
        "Written by `python tools/results.py` (`make results`); do not edit. "
        + ", ".join(f"{key}: {value}" for key, value in how.items())
        + "."
    )
    return "\n".join([title, "", note, *lines]) + "\n"


def write_page(name: str, found: Mapping[str, Measured]) -> None:
    """Write a page, its numbers and its figure."""
    (OUT / f"{name}.md").write_text(page_text(name, found), encoding="utf-8")
    comparison.write_numbers(OUT / f"{name}.json", found)
    if name in OWN:
        own = OWN[name]
        figure = comparison.kept_figure(own.scores(found), own.DRAWN, own.EVICTION)
    else:
        figure = comparison.bytes_figure(PAGES[name].columns, found)
    save_svg(figure, OUT / f"{name}.svg")


def main() -> int:
    """Parse the command line, do what is missing, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    pages = list(EVALUATIONS)
    parser.add_argument("--pages", nargs="+", default=pages, choices=pages)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "results")
    parser.add_argument("--items", help="per cell, instead of a configuration's")
    parser.add_argument("--keep", help="budgets, as in 0.5,0.25, likewise")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    work = args.work.absolute()
    fewer = [] if args.items is None else ["--items", args.items]
    fewer += [] if args.keep is None else ["--keep", args.keep]
    for it in (it for page in args.pages for it in EVALUATIONS[page]):
        if not args.report_only and it.model in args.models:
            evaluate(it, work, *fewer)
    written = 0
    for page in args.pages:
        names = [it.name for it in EVALUATIONS[page]]
        path, evals = OUT / f"{page}.json", work / "evals"
        found, unfinished = comparison.gather(path, names, evals)
        for directory in unfinished:
            print(f"{directory} is not finished: the page keeps what it had of it.")
        if names[0] in found:
            write_page(page, found)
            written += 1
    if not written:
        sys.exit(f"error: no evaluations in {work} that a page could be made of.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
