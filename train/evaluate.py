"""Held-out accuracy: teacher-forced while training, greedy for the model card.

`python -m kvjax.train.evaluate MODEL --items 500 --lengths 256 512` prints the
accuracies of a checkpoint directory and writes them as JSON.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from kvjax.eval.tasks import TASKS, Episode, Item, Turn, make_task
from kvjax.models.io import load
from kvjax.train.data import Mixture
from kvjax.train.data.batch import Batch, pack
from kvjax.train.data.rows import Row
from kvjax.train.data.tasks import characters
from kvjax.train.greedy import replies
from kvjax.train.recipe import TrainConfig


def held_out_batches(config: TrainConfig, mixture: Mixture, step: int):
    """Held-out rows of each source at the widths of the stage of `step`, by name.

    Tasks give `eval_items` items, datasets as many rows of their `held_out` split
    (again from its beginning where it has fewer); a dataset without one is left out.
    """
    out: dict[str, Batch] = {}
    for width in sorted(config.stages[config.stage_of(step)].lengths):
        for name in dict.fromkeys(s.task for s in config.data.sources if s.task):
            rows = _task_rows(name, config.eval_items, mixture, width)
            out[f"{name}@{width}"] = pack(rows, width, pad=mixture.words.pad)
        for name, reader in mixture.held_out.items():
            reader.reset()
            rows = [reader.take(width) for _ in range(config.eval_items)]
            out[f"{name}@{width}"] = pack(rows, width, pad=mixture.words.pad)
    return out


def _task_rows(name: str, items: int, mixture: Mixture, width: int) -> list[Row]:
    task = make_task(name)
    length = characters(task, mixture.words, width)
    while True:
        rows = []
        for item in task.generate(0, items, length):
            turn = Turn(question=item.question, answer=item.answer, meta=item.meta)
            rows.append(mixture.row(Episode(context=item.context, turns=(turn,))))
        if max(len(one.tokens) for one in rows) <= width:
            return rows
        length = length * 9 // 10  # more tokens than such text usually has


def variants(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of a task that the model card reports, by label."""
    if name == "recall":
        for width in (1, 4, 16):
            yield f"recall, {width}-character values", {"value_length": width}
    elif name == "induction":
        for shots in (1, 2, 4, 8):
            yield f"induction, {shots} shots", {"shots": shots}
    elif name == "chain":
        for steps in (1, 4, 8):
            yield f"chain, {steps} steps", {"steps": steps}
    yield name, {}


def accuracy(model, task: str, fields: dict, *, items: int, length: int, seed: int):
    """Mean score of greedy replies over held-out items, or None if none fits."""
    maker = make_task(task, **fields)
    try:
        questions: list[Item] = maker.generate(seed, items, length - 2)
    except ValueError:  # the records alone are longer than `length`
        return None
    given = replies(model, questions, maker.max_new_tokens)
    scores = [
        maker.score(item, reply) for item, reply in zip(questions, given, strict=True)
    ]
    return sum(scores) / len(scores)


def evaluate(
    path: pathlib.Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    items: int,
    lengths: Sequence[int],
    seed: int,
    detail: bool,
) -> dict[str, dict[str, float]]:
    """Accuracy by task (and by its variants) and by length."""
    # Weights as stored (bfloat16), products in float32: several times faster on a CPU.
    model, _ = load(path, dtype="float32", tokenizer=False)
    out: dict[str, dict[str, float]] = {}
    for name in tasks:
        for label, fields in variants(name):
            if fields and not detail:
                continue
            for length in lengths:
                value = accuracy(
                    model, name, fields, items=items, length=length, seed=seed
                )
                if value is not None:
                    out.setdefault(label, {})[str(length)] = value
                    print(f"{label:32} {length:5} {value:.3f}", flush=True)
    return out


def table(result: dict[str, dict[str, float]]) -> str:
    """Accuracies in percent as a Markdown table, one column per length."""
    lengths = sorted({length for row in result.values() for length in row}, key=int)
    lines = [
        "| task | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
        "|---|" + "---:|" * len(lengths),
    ]
    for label, values in result.items():
        cells = [f"{100 * values[n]:.1f}" if n in values else "" for n in lengths]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(
        prog="python -m kvjax.train.evaluate", description=__doc__
    )
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--detail", action="store_true", help="by value length etc.")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    result = evaluate(
        args.model,
        tasks=args.tasks,
        items=args.items,
        lengths=args.lengths,
        seed=args.seed,
        detail=args.detail,
    )
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
