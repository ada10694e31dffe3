"""Synthetic tasks as data: how long an episode is, and datasets for any trainer."""

from typing import TYPE_CHECKING, Any

from kvjax.eval.tasks import HELD_OUT, TRAIN, Task, make_task, stream
from kvjax.train.data.words import Words

if TYPE_CHECKING:
    from datasets import Dataset


def characters(task: Task, words: Words, width: int) -> int:
    """Characters of an episode whose row has about `width` tokens."""
    room = width - len(words.begin) - len(words.end)
    return int(words.density(task) * room)


def task_dataset(
    task: str,
    items: int,
    length: int,
    seed: int = 0,
    *,
    held_out: bool = False,
    **fields: Any,
) -> "Dataset":
    """A synthetic task as a `datasets.Dataset`, for any trainer.

    Args:
        task: its name.
        items: how many.
        length: characters of an item, at most about that many.
        seed: of the items.
        held_out: the items that `Task.generate` gives to evaluations, instead of ones
            that share no random stream with them.
        fields: of the task.

    Returns:
        Columns `context`, `question` and `answer`, text each.

    Raises:
        ValueError: unknown task or field, or a length that no item fits into.
    """
    import datasets

    maker = make_task(task, **fields)
    kind = HELD_OUT if held_out else f"{TRAIN}/dataset"
    table = []
    for index in range(items):
        episode = maker.episode(stream(kind, maker.name, seed, index), length)
        turn = episode.turns[0]
        table.append((episode.context, turn.question, turn.answer))
    names = ("context", "question", "answer")
    text = datasets.Features({name: datasets.Value("string") for name in names})
    return datasets.Dataset.from_list(
        [dict(zip(names, entry, strict=True)) for entry in table], features=text
    )
