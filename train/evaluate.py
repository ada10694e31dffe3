"""Held-out batches for the running evaluation."""

from kvjax.eval.tasks import Episode, Turn, make_task
from kvjax.train.config import TrainConfig
from kvjax.train.data import pack, row
from kvjax.train.objective import Batch


def held_out_batches(config: TrainConfig, step: int) -> dict[str, Batch]:
    """Held-out items of each task at the widths of the stage of `step`."""
    widths = _widths(config, step)
    tasks = dict.fromkeys(source.task for source in config.data.sources)
    out = {}
    for width in widths:
        for name in tasks:
            items = make_task(name).generate(0, config.eval_items, width - 2)
            rows = []
            for item in items:
                turn = Turn(question=item.question, answer=item.answer, meta=item.meta)
                episode = Episode(context=item.context, turns=(turn,))
                rows.append(row(episode, context_weight=config.data.context_weight))
            out[f"{name}@{width}"] = pack(rows, width)
    return out


def _widths(config: TrainConfig, step: int) -> list[int]:
    for stage in config.stages:
        if step <= stage.steps:
            return sorted(stage.lengths)
        step -= stage.steps
    return sorted(config.stages[-1].lengths)
