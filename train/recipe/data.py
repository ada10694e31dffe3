"""What a recipe says of its data."""

import dataclasses
import io
from typing import Annotated, Any

from kvjax.fields import Amount, Checked, Positive, PositiveReal, Range
from kvjax.files import check_plain
from kvjax.messages import shown

MOST_ROWS = 2**16
"""Of a step."""

Width = Annotated[int, Range(2, 2**24, hint="It is a row's tokens, one to predict.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Checked):
    """One source of rows: a task or a dataset, and its share of the rows.

    Attributes:
        task: a synthetic task; or
        dataset: a hub id (`owner/name`), a `.jsonl`, `.json`, `.parquet` or `.txt`
            file (of all but Parquet also `.gz`), a pattern of such files, or a folder
            of them.
        weight: share of the rows.
        fields: of the task; of a dataset of the hub, further arguments of
            `datasets.load_dataset`, such as `name`; of files `sample_by` (of text),
            `field` (of JSON) and `data_files`.
        split: of the dataset; slices as in `train[:95%]`.
        held_out: split of the running evaluation; empty: none.
        streaming: read the dataset as it is needed, never all of it.
        buffer: records that are shuffled together while streaming.
        encoding: of text and JSON files; empty: UTF-8.
        text: column of plain documents, packed into rows; or
        messages: column of chats; or
        context, prompt, answer: columns of a question; `context` may be empty.
        tools: column of what a chat's assistant may call, for the chat template: a
            list of JSON schemas, or that as text.
    """

    task: str = ""
    dataset: str = ""
    weight: PositiveReal = 1.0
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    split: str = "train"
    held_out: str = ""
    streaming: bool = False
    buffer: Positive = 1000
    encoding: str = ""
    text: str = ""
    messages: str = ""
    context: str = ""
    prompt: str = ""
    answer: str = ""
    tools: str = ""

    def __post_init__(self):
        super().__post_init__()
        check_plain("fields", self.fields)
        if bool(self.task) == bool(self.dataset):
            raise ValueError(
                "a source needs either `task` or `dataset`; got "
                f"{'both' if self.task else 'neither'}."
            )
        if self.task:
            self._check_task()
        else:
            self._check_dataset()

    def _check_task(self) -> None:
        shared = ("task", "weight", "fields")
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if field.name not in shared and given != field.default:
                raise ValueError(
                    f"`{field.name}` is of a dataset; the source is the task "
                    f"{self.task!r}. Put fields of the task under `fields`."
                )

    def _check_dataset(self) -> None:
        question = bool(self.context or self.prompt or self.answer)
        kinds = (bool(self.text), bool(self.messages), question)
        if sum(kinds) != 1 or (question and not (self.prompt and self.answer)):
            given = {name: getattr(self, name) for name in COLUMNS if name != "tools"}
            given = {name: column for name, column in given.items() if column}
            raise ValueError(
                f"dataset {shown(self.dataset)} needs the columns of one kind of "
                "record: `text`, or `messages`, or `prompt` and `answer` (and "
                f"`context`); got {given or 'none'}."
            )
        if self.tools and not self.messages:
            raise ValueError(
                f"dataset {shown(self.dataset)}: `tools` is a column beside "
                "`messages`; name that too, or leave `tools` out."
            )
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=self.encoding or "utf-8")
        except (LookupError, ValueError):
            raise ValueError(
                f"`encoding` must be one that Python knows, such as utf-16 or latin-1; "
                f"got {self.encoding!r}."
            ) from None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the dataset that are read."""
        named = (getattr(self, name) for name in COLUMNS)
        return tuple(column for column in named if column)


COLUMNS = ("text", "messages", "context", "prompt", "answer", "tools")
"""Fields of `Source` that name a column."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Checked):
    """`steps` steps of `tokens_per_step`, in rows of one width.

    Attributes:
        steps: how many.
        lengths: row widths to draw from, and their weights.
        tokens_per_step: rows times width.
        sources: the mixture of this stage; empty: that of the data.
    """

    steps: Positive
    lengths: dict[Width, Amount]
    tokens_per_step: Annotated[int, Range(1, 2**28)] = 8192
    sources: tuple[Source, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not any(self.lengths.values()):
            raise ValueError(
                "`lengths` must map at least one row width to a weight above 0, as in "
                f"{{256: 1}}; got {shown(self.lengths)}."
            )
        rows = self.rows(min(self.lengths))
        if rows > MOST_ROWS:
            raise ValueError(
                f"`tokens_per_step` of {self.tokens_per_step} is {rows} rows of "
                f"{min(self.lengths)} tokens; at most {MOST_ROWS} are made. Lower it, "
                "or train on longer rows."
            )

    def rows(self, width: int) -> int:
        """Of a step, at one width; at least one."""
        return max(1, self.tokens_per_step // width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """The mixture and how it is packed.

    Attributes:
        sources: tasks and datasets.
        context_weight: loss weight of a task's tokens outside of answers.
        turns: questions per 128 tokens of row, at most, where a task allows several.
    """

    sources: tuple[Source, ...]
    context_weight: Amount = 0.03
    turns: Positive = 3

    @property
    def held_out_tasks(self) -> dict[str, dict[str, Any]]:
        """Tasks by name, and the fields with which held-out items of them are made.

        A task that is named with other fields elsewhere has none here.
        """
        found: dict[str, dict[str, Any]] = {}
        for source in self.sources:
            if source.task:
                fields = found.setdefault(source.task, source.fields)
                found[source.task] = fields if fields == source.fields else {}
        return found

    def __post_init__(self):
        super().__post_init__()
        if not self.sources:
            raise ValueError(
                "`sources` must list at least one task or dataset; got none. Add "
                "`- {task: recall}`."
            )
