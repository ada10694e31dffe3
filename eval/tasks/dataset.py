"""Published benchmarks: contexts, questions and answers from a file or from the hub.

The layout is that of kvpress' data sets (`simonjegou/ruler` and others): columns
`context`, `question`, `answer`, perhaps `answer_prefix`, `max_new_tokens`, `task`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, final

from kvjax.eval.metrics import AUTO, FAMILIES, METRICS, metric_names, perfect
from kvjax.eval.metrics.longbench import CLASSES
from kvjax.eval.tasks.base import Episode, Task, Turn
from kvjax.eval.tasks.from_files import Draft, FileTask, draft
from kvjax.eval.tasks.reading_files import Record, read_records
from kvjax.eval.tasks.stamps import stamp
from kvjax.fields import OneOf, Positive
from kvjax.messages import nearest, shown
from kvjax.places import expanded

_ANSWER = "answer|answers|outputs"
_SAID = ("difficulty", "length")
"""Columns that tell rows apart in some benchmarks, kept for whoever reads the rows."""
_FURTHER = ("answer_prefix", "max_new_tokens", "task", CLASSES, *_SAID)
TYPICAL = 128
"""Tokens of a reply where neither the data nor `new_tokens` says how many."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset(FileTask):
    """Rows of a data set; those with the same context are questions of one episode.

    Attributes:
        path: a file (Parquet, JSON lines, CSV), a folder of these, or a hub id.
        config: of a hub id or a folder: `"4096"` of `simonjegou/ruler`.
        split: of a hub id or a folder.
        task: only rows whose column `task` says this.
        metric: a metric, a benchmark, which has one for each of its tasks, or `auto`:
            the benchmark that the path names, or that has all these tasks.
        new_tokens: of a reply, instead of what the column `max_new_tokens` says.
        unanswered: what becomes of rows with an empty answer: `refuse` (an error), or
            `leave_out`.
    """

    name: ClassVar[str] = "dataset"

    path: str = ""
    config: str = ""
    split: str = "test"
    task: str = ""
    metric: Annotated[str, OneOf(AUTO, *FAMILIES, *METRICS)] = AUTO
    new_tokens: Positive | None = None
    unanswered: Annotated[str, OneOf("refuse", "leave_out")] = "refuse"

    @property
    def max_new_tokens(self) -> int:
        """Of replies whose turn does not say it."""
        return self.new_tokens or TYPICAL

    def parts(self) -> Mapping[str, Task]:
        """Rows of each `task` are scored apart."""
        if self.task or not self.path:
            return {"": self}
        rows = self._every_row()
        kinds = list(dict.fromkeys(str(row.values.get("task", "")) for row in rows))
        if len(kinds) == 1:
            return {"": self}
        return {kind: dataclasses.replace(self, task=kind) for kind in kinds}

    def drafts(self, turns: int) -> Sequence[Draft]:
        """See `FileTask.drafts`; a context with more questions comes several times."""
        self.place()
        metric_names(self.metric, self.path, [])  # before much is read
        rows = self._rows()
        kinds = [self._kind(row) for row in rows]
        try:
            metrics = metric_names(self.metric, self.path, kinds)
        except ValueError as wrong:
            raise ValueError(f"{shown(self.path)}: {wrong}") from None
        groups: dict[str, list[Record]] = {}
        for row in rows:
            groups.setdefault(row.text("context", empty=True), []).append(row)
        made = []
        for context, group in groups.items():
            asked = [self._turn(row, metrics[self._kind(row)]) for row in group]
            for i in range(0, len(asked), turns):
                episode = Episode(context=context, turns=tuple(asked[i : i + turns]))
                made.append(draft(group[i].place, episode))
        return made

    def _rows(self) -> list[Record]:
        rows = self._every_row()
        rows = self._of_task(rows) if self.task else rows
        empty = [one for one in rows if one.values.get("answer", "") in ("", [], [""])]
        if empty and self.unanswered == "refuse":
            raise ValueError(
                f"{empty[0].place}: `answer` is empty, as in {len(empty)} of "
                f"{len(rows)} rows. Set `unanswered: leave_out` to ask the others."
            )
        if len(empty) == len(rows):
            raise ValueError(f"{rows[0].place}: `answer` is empty, as in all rows.")
        places = {one.place for one in empty}
        return [one for one in rows if one.place not in places]

    def place(self) -> str:
        """See `FileTask.place`."""
        if not self.path:
            raise ValueError(
                "Task 'dataset' needs `path`: a Parquet, JSON lines or CSV file, or a "
                "hub id (simonjegou/ruler, with `config`)."
            )
        return self.path

    def _every_row(self) -> list[Record]:
        place = expanded(self.path)
        below = (place, place / self.config, place / "data" / self.config)
        folders = dict.fromkeys((*below, place / self.config / "data"))
        stamps = [n for folder in folders for n in stamp(str(folder))]
        return _read(self.path, self.config, self.split, *stamps)

    def _of_task(self, rows: list[Record]) -> list[Record]:
        kinds = list(dict.fromkeys(str(one.values.get("task", "")) for one in rows))
        kept = [one for one in rows if one.values.get("task", "") == self.task]
        if not kept:
            raise ValueError(
                f"{rows[0].place}: no row has `task` {shown(self.task)}; there is "
                f"{shown(kinds)}.{nearest(self.task, kinds)}"
            )
        return kept

    def _kind(self, row: Record) -> str:
        """What a row is of; the configuration where the row does not say."""
        return row.text("task") if "task" in row.values else self.config

    def _turn(self, row: Record, metric: str) -> Turn:
        answers, asks = row.texts("answer"), "question" in row.values
        prefix = ""
        if "answer_prefix" in row.values:
            prefix = row.text("answer_prefix", empty=True)
        space = " " if prefix and not prefix[-1].isspace() else ""
        meta: dict[str, Any] = {"metric": metric, "kind": self._kind(row)}
        told = {name: row.values.get(name) for name in _SAID}
        meta |= {k: v for k, v in told.items() if isinstance(v, str | int | float)}
        if row.values.get(CLASSES):
            meta[CLASSES] = row.texts(CLASSES)
        turn = Turn(
            question=row.text("question", empty=True) if asks else "",
            answer=space + perfect(metric, answers),
            meta=meta,
            prefix=prefix,
            answers=answers,
            max_new_tokens=self._tokens(row),
        )
        try:
            METRICS[metric](turn, "")  # what it needs is there
        except ValueError as wrong:
            raise ValueError(f"{row.place}: {wrong}") from None
        return turn

    def _tokens(self, row: Record) -> int | None:
        if self.new_tokens:
            return self.new_tokens
        if "max_new_tokens" not in row.values:
            raise ValueError(
                f"{row.place}: there is no `max_new_tokens`. Set `new_tokens`: how "
                "many tokens a reply may have."
            )
        return row.whole("max_new_tokens", 1)

    def score(self, item: Turn, reply: str) -> float:
        """By the metric of the row."""
        return METRICS[item.meta["metric"]](item, reply)


@functools.lru_cache(1)  # its parts read it one after the other
def _read(path: str, config: str, split: str, *stamps: int) -> list[Record]:
    del stamps
    return read_records(
        path,
        ("context",),
        nullable=("question", _ANSWER),
        optional=_FURTHER,
        config=config,
        split=split,
    )
