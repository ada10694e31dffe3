"""One episode of a task, drawn as an evaluation draws its."""

from typing import Any

from kvjax.eval.tasks import Episode, Task, make_task, stream


def episode(
    name: str, size: int, turns: int = 1, seed: int = 0, **fields: Any
) -> tuple[Task, Episode]:
    """A task with these fields, and an episode of `size` of its units."""
    task = make_task(name, **fields)
    return task, task.episode(stream("test", name, seed, 0), size, turns)
