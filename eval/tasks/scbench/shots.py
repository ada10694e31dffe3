"""SCBench's many examples in the context, from a file of yours."""

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import ClassVar

from kvjax.eval.tasks.base import Episode, Task, Turn
from kvjax.eval.tasks.matching import any_found
from kvjax.eval.tasks.reading_files import read_records
from kvjax.eval.tasks.stamps import stamp
from kvjax.fields import Positive
from kvjax.places import expanded


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyShot(Task):
    """Questions with their labels, then a question of the same kind.

    A context has no example twice, and none that is asked. Where the file has fewer
    than `length` holds, it has them all.

    Attributes:
        path: a file with the columns `text` (or `question`, `input`) and `label` (or
            `answer`, `target`).
        reply_tokens: what a reply may have.

    Source: Li et al. 2024, github.com/microsoft/MInference, `scbench_many_shot`.
        Deviation: its examples, of BIG-Bench Hard, are not shipped; the wording
        `Q:`, `A:` is that of BIG-Bench Hard.
    """

    unit: ClassVar[str] = "examples"
    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str = ""
    reply_tokens: Positive = 10

    @property
    def max_new_tokens(self) -> int:
        """As published, if nothing else is said."""
        return self.reply_tokens

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; so many examples.

        Raises:
            ValueError: there is no file, or it has no more examples than questions.
        """
        found = self._read()
        if len(found) <= turns:
            raise ValueError(
                f"Task {self.name!r}: {self.path} has {len(found)} examples, which is "
                f"no more than {turns} questions. Give it more of them."
            )
        drawn = rng.sample(found, min(len(found), turns + size))
        asked, shots = drawn[:turns], drawn[turns:]
        return Episode(
            context="".join(f"Q: {text}\nA: {label}\n\n" for text, label in shots),
            turns=tuple(
                Turn(
                    question=f"Q: {text}\nA:",
                    answer=f" {label}",
                    answers=(label,),
                    meta={"examples": len(shots)},
                )
                for text, label in asked
            ),
        )

    def score(self, item: Turn, reply: str) -> float:
        """1 if the reply contains the label, whatever its case."""
        return any_found(reply, item.answers)

    def lacks(self) -> str:
        """The file."""
        if self.path:
            return ""
        return (
            "it needs `path`: a file of examples with the columns `text` and `label`, "
            "JSON lines say. None is shipped."
        )

    def _read(self) -> Sequence[tuple[str, str]]:
        if lacks := self.lacks():
            raise ValueError(f"Task {self.name!r}: {lacks}")
        return _examples(self.path, *stamp(str(expanded(self.path))))


@functools.lru_cache(2)
def _examples(path: str, *stamps: int) -> Sequence[tuple[str, str]]:
    del stamps
    columns = ("text|question|input", "label|answer|target")
    return [
        (one.text("text").strip(), one.text("label").strip())
        for one in read_records(path, columns)
    ]
