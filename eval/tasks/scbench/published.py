"""SCBench's own records: a context and the questions that it was published with."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, final

from kvjax.eval.tasks.base import Turn
from kvjax.eval.tasks.from_files import Draft, FileTask
from kvjax.eval.tasks.given_or_made import inside
from kvjax.eval.tasks.matching import any_found, numbers, share_found
from kvjax.eval.tasks.reading_files import Record, read_records
from kvjax.fields import OneOf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How SCBench asks and scores one of its tasks.

    Attributes:
        before: stands before the context.
        question: with `{input}`, a turn's.
        max_new_tokens: of a reply.
        score: of a reply and the references.
    """

    before: str
    max_new_tokens: int
    score: Callable[[str, Sequence[str]], float]
    question: str = "{input}"


def _exactly(reply: str, references: Sequence[str]) -> float:
    return float(references[0] in reply)


def _first(reply: str, references: Sequence[str]) -> float:
    return float(numbers(reply)[:1] == [references[0]])


_JSON = "Extract the value corresponding to the specified key in the JSON object below."
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "kv": Kind(before=f"{_JSON}\n\n", max_new_tokens=150, score=_exactly),
        "prefix_suffix": Kind(before="", max_new_tokens=150, score=_exactly),
        "vt": Kind(before="", max_new_tokens=30, score=share_found),
        "mf": Kind(
            before="",
            question="What is {which}?\n\n{input}",
            max_new_tokens=5,
            score=_first,
        ),
        "many_shot": Kind(before="", max_new_tokens=10, score=any_found),
        "qa_eng": Kind(
            before="Read the book and answer the question. Be very concise in your "
            "answer.\n\n",
            question="Question: {input}\nAnswer:",
            max_new_tokens=40,
            score=any_found,
        ),
    }
)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedContext(FileTask):
    """A context of SCBench's files, and the questions about it in their order.

    Attributes:
        path: a file of `context` and `multi_turns`, each with `input` and `answer`.
        kind: which of its tasks the file is of.

    Source: Li et al. 2024, github.com/microsoft/MInference, `scbench`: wording, new
        tokens and scores as they are coded. Deviation: of `mf`, nothing stands before
        the list, where the first question does there.
    """

    name: ClassVar[str] = "scbench"

    path: str = ""
    kind: Annotated[str, OneOf(*KINDS)] = "kv"

    @property
    def max_new_tokens(self) -> int:
        """As published."""
        return KINDS[self.kind].max_new_tokens

    def place(self) -> str:
        """See `FileTask.place`."""
        if not self.path:
            raise ValueError(
                f"Task {self.name!r} needs `path`: a file of SCBench with the columns "
                "`context` and `multi_turns`. None is shipped; without one there are "
                "scbench_kv, scbench_vt and others, which are generated."
            )
        return self.path

    def drafts(self, turns: int) -> Sequence[Draft]:
        """See `FileTask.drafts`."""
        records = read_records(self.place(), ("context", "multi_turns"))
        return [self._draft(one, turns) for one in records]

    def score(self, item: Turn, reply: str) -> float:
        """As published: of `vt`, the share of the names; of others, right or wrong."""
        return KINDS[self.kind].score(reply, item.answers)

    def _draft(self, record: Record, turns: int) -> Draft:
        context = record.values["context"]
        if self.kind == "mf" and isinstance(context, list):
            if not all(isinstance(one, int | float) for one in context):
                raise record.wrong("context", "a list of numbers")
            context = str(context)
        if not isinstance(context, str) or not context.strip():
            raise record.wrong("context", "a text that is not empty")
        asked = record.values["multi_turns"]
        if not isinstance(asked, list) or not asked:
            raise record.wrong("multi_turns", "a list of questions, not empty")
        made = [self._turn(record, at, one) for at, one in enumerate(asked[:turns])]
        before = KINDS[self.kind].before
        return inside(record.place, before, context, "\n\n", made)

    def _turn(self, record: Record, at: int, value: Any) -> Turn:
        place = f"{record.place}, multi_turns[{at}]"
        if not isinstance(value, Mapping):
            raise record.wrong("multi_turns", "a list of objects")
        turn = Record(place=place, values=value)
        text, answers = turn.text("input"), turn.texts("answer")
        which = ""
        if self.kind == "mf":
            found = re.search("The .+ is", text)
            if not found or not re.fullmatch("[0-9]+", answers[0]):
                raise turn.wrong("input", "`The ... is`, with a whole number as answer")
            which = found[0].lower().removesuffix(" is")
        answer = " ".join(answers) if self.kind == "vt" else answers[0]
        question = KINDS[self.kind].question.format(input=text, which=which)
        return Turn(
            question=question,
            answer=answer if question.endswith((" ", "\n")) else f" {answer}",
            answers=answers,
            meta={"place": place},
        )
