"""Values behind keys in long records: JSON objects, and numbered lines of LongEval."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, ClassVar

from kvjax.eval.tasks.base import Episode, Turn, stream
from kvjax.eval.tasks.from_files import Draft
from kvjax.eval.tasks.given_or_made import GivenOrMade, inside, placed
from kvjax.eval.tasks.matching import any_found, numbers
from kvjax.eval.tasks.reading_files import Record, read_records
from kvjax.eval.tasks.words import distinct, identifier, named, pairs
from kvjax.fields import OneOf, Share

ASK = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
)
LAYOUTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "lines": (",\n ", 'Key: "{key}"\nCorresponding value:'),
        "row": (
            ", ",
            '\nKey: "{key}"\nThe value associated with the specified key is: ',
        ),
    }
)
"""What stands between two pairs, and the question."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValue(GivenOrMade):
    """A JSON object of random identifiers; the value of one of them is asked.

    Attributes:
        path: a file of `kv-retrieval-75_keys.jsonl.gz` layout: `ordered_kv_records`,
            `key`, `value`; empty: items are generated, of any length.
        layout: `lines`, a pair in each, as in Lost in the Middle; `row`, all in one, as
            in InfiniteBench and SCBench.
        depth: place of the pair that is asked first, as a fraction of the object;
            None: anywhere, of a file where it stands.

    Source: Liu et al. 2023, github.com/nelson-liu/lost-in-the-middle (`lines`); Zhang
        et al. 2024, github.com/OpenBMB/InfiniteBench, and Li et al. 2024,
        github.com/microsoft/MInference, `scbench` (`row`). Deviation: of a file, the
        second question of a context and those behind it ask random further keys.
    """

    unit: ClassVar[str] = "pairs"
    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str = ""
    layout: Annotated[str, OneOf("lines", "row")] = "lines"
    depth: Share | None = None

    @property
    def max_new_tokens(self) -> int:
        """Of the published evaluations."""
        return {"lines": 100, "row": 150}[self.layout]

    def made(self, rng: random.Random, size: int, turns: int) -> Episode:
        """See `Task.episode`; so many pairs, and one for each question at least."""
        size = max(size, turns)
        names = distinct(lambda: identifier(rng), 2 * size)
        return self._asked(
            rng, list(zip(names[:size], names[size:], strict=True)), turns
        )

    def drafts(self, turns: int) -> Sequence[Draft]:
        """See `FileTask.drafts`."""
        return _pairs_of(self, turns)

    def score(self, item: Turn, reply: str) -> float:
        """1 if the reply contains the value; in `row`, letter by letter."""
        if self.layout == "row":
            return float(item.answers[0] in reply)
        return any_found(reply, item.answers)

    def _asked(
        self,
        rng: random.Random,
        records: list[tuple[str, str]],
        turns: int,
        first: int | None = None,
    ) -> Episode:
        """The object with its questions, the first of which asks the record `first`."""
        count = len(records)
        first = rng.randrange(count) if first is None else first
        others = [at for at in range(count) if at != first]
        asked = [first, *rng.sample(others, min(turns - 1, len(others)))]
        turn_of = [self._turn(*records[at]) for at in asked]
        between, _ = LAYOUTS[self.layout]
        body = between.join(
            f'"{key}": "{value}"' for key, value in placed(records, first, self.depth)
        )
        return Episode(context=f"{ASK}JSON data:\n{{{body}}}\n\n", turns=tuple(turn_of))

    def _turn(self, key: str, value: str) -> Turn:
        _, question = LAYOUTS[self.layout]
        return Turn(
            question=question.format(key=key),
            answer=value if question.endswith(" ") else f" {value}",
            answers=(value,),
            meta={"key": key, "depth": self.depth},
        )


def _pairs_of(task: KeyValue, turns: int) -> Sequence[Draft]:
    records = read_records(task.path, ("ordered_kv_records", "key", "value"))
    return [_pairs_draft(task, one, at, turns) for at, one in enumerate(records)]


def _pairs_draft(task: KeyValue, record: Record, at: int, turns: int) -> Draft:
    found: list[tuple[str, str]] = []
    pairs_ = record.values["ordered_kv_records"]
    for one in pairs_ if isinstance(pairs_, list) else ():
        match one:
            case [str(key), str(value)]:
                found.append((key, value))
            case _:
                raise record.wrong("ordered_kv_records", "a list of [key, value]")
    wanted = (record.text("key"), record.text("value"))
    if wanted not in found:
        raise record.wrong("ordered_kv_records", f"a list that has {list(wanted)}")
    rng = stream("turns", task.name, 0, at)
    episode = task._asked(rng, found, turns, found.index(wanted))
    before, text, after = _parted(episode.context, "JSON data:\n", "\n\n")
    return inside(record.place, before, text, after, episode.turns)


def _parted(context: str, head: str, tail: str) -> tuple[str, str, str]:
    """A context before, in and behind what may be cut."""
    at = context.index(head) + len(head)
    return context[:at], context[at : len(context) - len(tail)], tail


HEAD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line "
    "<line index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a "
    "numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the "
    "corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:"
    "\n\n"
)
OVER = "Now the record is over."
QUESTION = (
    f"{OVER} Tell me what is the <REGISTER_CONTENT> in line {{key}}? I need the "
    "number. "
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines(GivenOrMade):
    """`line torpid-kid: REGISTER_CONTENT is <24169>`; the number of one line is asked.

    Attributes:
        path: a file of LongEval's `200_lines.jsonl` layout: `prompt`,
            `expected_number`; empty: items are generated, of any length.
        depth: place of the line that is asked first, as a fraction of the record;
            None: anywhere. Only of generated items.
        words: see `Needle`.

    Source: Li et al. 2023, github.com/DachengLi1/LongChat, `longeval`. Deviations: (1)
        other words than there, where none are given; (2) of a file, one question of
        each context.
    """

    unit: ClassVar[str] = "lines"
    paths: ClassVar[tuple[str, ...]] = ("path", "words")

    path: str = ""
    depth: Share | None = None
    words: str = ""

    @property
    def max_new_tokens(self) -> int:
        """Of the published evaluation."""
        return 100

    def made(self, rng: random.Random, size: int, turns: int) -> Episode:
        """See `Task.episode`; so many lines, and one for each question at least."""
        size = max(size, turns)
        keys = named(rng, "words", size, pairs(self.words))
        records = [(key, str(rng.randint(1, 50_000))) for key in keys]
        asked = rng.sample(range(size), turns)
        text = "".join(
            f"line {key}: REGISTER_CONTENT is <{value}>\n"
            for key, value in placed(records, asked[0], self.depth)
        )
        return Episode(
            context=f"{HEAD}{text}\n",
            turns=tuple(
                Turn(
                    question=QUESTION.format(key=records[at][0]),
                    answer=records[at][1],
                    answers=(records[at][1],),
                    meta={"key": records[at][0], "depth": self.depth},
                )
                for at in asked
            ),
        )

    def drafts(self, turns: int) -> Sequence[Draft]:
        """See `FileTask.drafts`."""
        del turns
        return _lines_of(self.path)

    def score(self, item: Turn, reply: str) -> float:
        """1 if the last number of the reply is that of the line."""
        return float(numbers(reply)[-1:] == [item.answers[0]])


def _lines_of(path: str) -> Sequence[Draft]:
    return [_lines_draft(one) for one in read_records(path, _COLUMNS)]


_COLUMNS = ("prompt", "expected_number")


def _lines_draft(record: Record) -> Draft:
    prompt, number = record.text("prompt"), str(record.whole("expected_number"))
    text, over, question = prompt.rpartition(OVER)
    if not over or f"<{number}>" not in text:
        raise record.wrong(
            "prompt", f"a text with <{number}> in it and {OVER!r} behind it"
        )
    turn = Turn(
        question=over + question,
        answer=number,
        answers=(number,),
        meta={"place": record.place},
    )
    head, gap, body = text.partition("\n\n")
    if not gap:
        head, body = "", text
    return inside(record.place, head + gap, body, "", [turn])
