"""Held-out rows of a recipe's sources, for the loss with a full cache."""

from kvjax.eval.tasks import Task, make_task
from kvjax.train.data.batch import TokenBatch, pack
from kvjax.train.data.mixture import Mixture
from kvjax.train.data.rows import TokenRow
from kvjax.train.recipe import TrainConfig


def held_out_batches(config: TrainConfig, mixture: Mixture, step: int):
    """Held-out rows of each source at the widths of the stage of `step`, by name.

    Tasks give `eval_items` items, datasets as many rows of their `held_out` split
    (again from its beginning where it has fewer); a dataset without one is left out.
    """
    out: dict[str, TokenBatch] = {}
    for width in sorted(config.stages[config.stage_of(step)].lengths):
        for name, fields in config.data.held_out_tasks.items():
            task = make_task(name, **fields)
            rows = _task_rows(task, config.eval_items, mixture, width)
            out[f"{name}@{width}"] = pack(rows, width, pad=mixture.words.pad)
        for name, reader in mixture.held_out.items():
            reader.reset()
            rows = [reader.take(width) for _ in range(config.eval_items)]
            out[f"{name}@{width}"] = pack(rows, width, pad=mixture.words.pad)
    return out


def _task_rows(task: Task, items: int, mixture: Mixture, width: int) -> list[TokenRow]:
    made = mixture.rows_of(task)
    return [made.row(item.alone) for item in made.held_out(items, width)]
