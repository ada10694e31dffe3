"""BABILong: facts of bAbI in pages of books, read from its published files."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, ClassVar

from kvjax.eval.tasks.babilong_words import EXAMPLES, FORMATS, INSTRUCTIONS
from kvjax.eval.tasks.base import Task, Turn
from kvjax.eval.tasks.from_files import Draft, FileTask, given_file
from kvjax.eval.tasks.given_or_made import inside
from kvjax.eval.tasks.reading_files import read_records
from kvjax.eval.tasks.variants import variant
from kvjax.fields import OneOf

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
        "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    }
)
"""What replies may name, in lower case."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BabiLong(FileTask):
    """Facts about people, places and things in pages of books, and a question.

    Attributes:
        path: a file of `input`, `question` and `target`; empty: `eval/babilong` in the
            folder that the environment variable KVJAX_DATA names, 1k tokens.
        question: which of the questions of bAbI the file has.

    Source: Kuratov et al. 2024, github.com/booydar/babilong, `prompts.py` and
        `metrics.py`.
    """

    multi_turn: ClassVar[bool] = False
    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str = ""
    question: Annotated[str, OneOf(*LABELS)] = "qa1"

    @property
    def max_new_tokens(self) -> int:
        """Of the published evaluation."""
        return 20

    def drafts(self, turns: int) -> Sequence[Draft]:
        """See `FileTask.drafts`."""
        del turns
        kind = self.question
        file = self.place()
        parts = (INSTRUCTIONS[kind], EXAMPLES[kind], FORMATS[kind], "<context>\n")
        before = "\n\n".join(parts)
        found = []
        for record in read_records(file, ("input", "question", "target")):
            target = record.text("target").strip()
            if target.lower() not in LABELS[kind]:
                raise record.wrong("target", f"one of {list(LABELS[kind])} ({kind})")
            turn = Turn(
                question=f"Question: {record.text('question').strip()}",
                answer=target,
                answers=(target,),
                meta={"place": record.place},
            )
            text = record.text("input").strip()
            after = "\n</context>\n\n"
            found.append(inside(record.place, before, text, after, [turn]))
        return found

    def place(self) -> str:
        """See `FileTask.place`."""
        name = f"{self.question}_1k.jsonl.gz"
        return given_file(self.name, "path", self.path, "babilong", name)

    def score(self, item: Turn, reply: str) -> float:
        """1 if the answer is the only label in the first sentence of the reply.

        Labels that the question names do not count.
        """
        text = reply.lower().split(".")[0]
        text = text.split("<context>")[0].split("<example>")[0]
        asked = item.question.lower()
        named = {
            one for one in LABELS[self.question] if one in text and one not in asked
        }
        return float(named == {item.answers[0].lower()})


BABILONG: Mapping[str, type[Task]] = MappingProxyType(
    {
        name: variant(BabiLong, name, question=name.removeprefix("babilong_"))
        for name in (f"babilong_{kind}" for kind in LABELS)
    }
)
