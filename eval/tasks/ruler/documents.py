"""RULER's questions about documents, of which one or a few hold the answer."""

import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from kvjax.eval.tasks.base import (
    HELD_OUT,
    Episode,
    Measure,
    Task,
    Turn,
    stream,
)
from kvjax.eval.tasks.fitting import fitted
from kvjax.eval.tasks.matching import any_found
from kvjax.eval.tasks.reading_files import Record, read_records
from kvjax.eval.tasks.stamps import stamp
from kvjax.fields import OneOf
from kvjax.files import read_json, regular
from kvjax.messages import shown
from kvjax.places import expanded

ASK = (
    "Answer the question based on the given documents. Only give me the answer and do "
    "not output any other words."
)
BEFORE = f"{ASK}\n\nThe following are given documents.\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A question of a file.

    Attributes:
        question: as it is asked.
        answers: any of them is right.
        documents: numbers of those that hold the answer, or should be there with it.
        near: numbers of further ones, which come before all others.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentQuestions(Task):
    """Numbered documents, and a question that one or a few of them answer.

    The documents that hold the answer, those of the same article, then others of the
    file, in random order.

    Attributes:
        path: a file of SQuAD or HotpotQA as they are published.
        layout: which of them.

    Source: Hsieh et al. 2024, github.com/NVIDIA/RULER, `qa.py`. Deviation: questions
        are drawn by the seed, where they are the first of the file there.
    """

    unit: ClassVar[str] = "documents"
    paths: ClassVar[tuple[str, ...]] = ("path",)
    multi_turn: ClassVar[bool] = False

    path: str = ""
    layout: Annotated[str, OneOf("squad", "hotpotqa")] = "squad"

    @property
    def max_new_tokens(self) -> int:
        """As RULER has it."""
        return 32

    def episode(self, rng: random.Random, size: int, turns: int = 1) -> Episode:
        """See `Task.episode`; a random question with so many documents.

        Raises:
            ValueError: there is no file, or it is of another layout.
        """
        del turns
        asked, documents = self._read()
        return _made(rng, rng.choice(asked), documents, size)

    def _drawn(
        self, seed: int, count: int, length: int, measure: Measure, turns: int
    ) -> list[Episode]:
        """No question is asked twice.

        Raises:
            ValueError: the file has fewer questions; as in `episode`.
        """
        del turns
        asked, documents = self._read()
        if len(asked) < count:
            raise ValueError(
                f"Task {self.name!r}: {self.path} has {len(asked)} questions that can "
                f"be answered; {count} are asked for. Ask for fewer (`items`)."
            )
        order = stream(HELD_OUT, self.name, seed, 0).sample(asked, len(asked))
        return [
            fitted(
                lambda size, i=i: _made(
                    stream(HELD_OUT, self.name, seed, i + 1), order[i], documents, size
                ),
                measure,
                smallest=1,
                most=length,
                what=f"task {self.name!r}, question {shown(order[i].question)},",
            )
            for i in range(count)
        ]

    def score(self, item: Turn, reply: str) -> float:
        """1 if the reply contains one of the answers."""
        return any_found(reply, item.answers)

    def lacks(self) -> str:
        """The file."""
        if self.path:
            return ""
        what = {
            "squad": "SQuAD's (dev-v2.0.json)",
            "hotpotqa": "HotpotQA's (hotpot_dev_distractor_v1.json)",
        }
        return (
            f"it needs `path`: a JSON file of {what[self.layout]} layout, which is not "
            "shipped."
        )

    def _read(self) -> tuple[Sequence[Asked], Sequence[str]]:
        if lacks := self.lacks():
            raise ValueError(f"Task {self.name!r}: {lacks}")
        path = str(regular(expanded(self.path)))
        return _file(path, self.layout, *stamp(path))


def _made(
    rng: random.Random, one: Asked, documents: Sequence[str], size: int
) -> Episode:
    picked = [*one.documents]
    more = max(0, size - len(picked))
    near = list(one.near)
    picked += near if more > len(near) else rng.sample(near, more)
    if more > len(near):
        known = {*picked}
        others = [at for at in range(len(documents)) if at not in known]
        picked += rng.sample(others, min(len(others), size - len(picked)))
    # Of a file that is too small all come again.
    again = range(len(picked), size) if len(picked) == len(documents) else ()
    picked += [at % len(documents) for at in again]
    rng.shuffle(picked)
    text = "\n\n".join(
        f"Document {at}:\n{documents[number]}" for at, number in enumerate(picked, 1)
    )
    turn = Turn(
        question=f"{ASK}\n\nQuestion: {one.question} ",
        prefix="Answer:",
        answer=f" {one.answers[0]}",
        answers=one.answers,
        meta={"documents": len(picked)},
    )
    return Episode(context=f"{BEFORE}{text}\n\n", turns=(turn,))


@functools.lru_cache(2)
def _file(
    path: str, layout: str, *stamps: int
) -> tuple[Sequence[Asked], Sequence[str]]:
    del stamps
    pages: dict[str, int] = {}
    read = {"squad": _squad, "hotpotqa": _hotpotqa}[layout]
    asked = list(read(path, pages))
    if not asked:
        raise ValueError(f"{path} has no question that can be answered.")
    return asked, list(pages)


def _squad(path: str, pages: dict[str, int]) -> Iterator[Asked]:
    for n, article in enumerate(_part(read_json(path), "data", path)):
        where = f"{path}, data[{n}]"
        paragraphs = _part(article, "paragraphs", where)
        texts = []
        for m, one in enumerate(paragraphs):
            text = _record(one, f"{where}.paragraphs[{m}]").text("context")
            texts.append(pages.setdefault(text, len(pages)))
        for m, one in enumerate(paragraphs):
            inside = f"{where}.paragraphs[{m}]"
            for k, query in enumerate(_part(one, "qas", inside)):
                record = _record(query, f"{inside}.qas[{k}]")
                impossible = record.values.get("is_impossible")
                if not isinstance(impossible, bool | None):
                    raise record.wrong("is_impossible", "true or false")
                if impossible:
                    continue
                answers = _part(query, "answers", record.place)
                found = [
                    _record(a, f"{record.place}.answers").text("text") for a in answers
                ]
                if not found:
                    raise record.wrong("answers", "a list of one or more")
                yield Asked(
                    question=record.text("question").strip(),
                    answers=tuple(dict.fromkeys(found)),
                    documents=(texts[m],),
                    near=tuple(at for at in dict.fromkeys(texts) if at != texts[m]),
                )


def _hotpotqa(path: str, pages: dict[str, int]) -> Iterator[Asked]:
    for record in read_records(path, ("question", "answer", "context")):
        numbers, context = [], record.values["context"]
        if not isinstance(context, list) or not context:
            raise record.wrong("context", "a list of [title, [sentence, ...]]")
        for one in context:
            match one:
                case [str(title), [*lines]] if all(isinstance(x, str) for x in lines):
                    page = f"{title}\n{''.join(lines)}"
                    numbers.append(pages.setdefault(page, len(pages)))
                case _:
                    raise record.wrong("context", "a list of [title, [sentence, ...]]")
        yield Asked(
            question=record.text("question").strip(),
            answers=(record.text("answer"),),
            documents=tuple(dict.fromkeys(numbers)),
        )


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: expected an object; got {shown(value)}.")
    return Record(place=place, values=value)


def _part(value: Any, name: str, place: str) -> Sequence[Any]:
    record = _record(value, place)
    found = record.values.get(name)
    if not isinstance(found, list):
        raise record.wrong(name, "a list, as SQuAD has it")
    return found
