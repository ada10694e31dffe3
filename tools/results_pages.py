"""Tables of docs/results/: accuracies of models under compressions."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Cell = tuple[str, str, str, float | None]
"""Task, visibility, compression, keep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """One finished evaluation.

    Attributes:
        scores: accuracy per cell, in [0, 1].
        bytes: of the cache per prompt and cell.
        header: its `run.json`.
    """

    scores: Mapping[Cell, float]
    bytes: Mapping[Cell, float]
    header: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a page: one compression of one evaluation."""

    title: str
    evaluation: str
    compression: str
    keep: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What a page says before its table, and the table's columns."""

    title: str
    text: str
    columns: tuple[Column, ...]


def _columns(
    evaluation: str, *names: str, keeps: Sequence[float], after: str = ""
) -> tuple[Column, ...]:
    return tuple(
        Column(
            title=f"{name}, {keep:g}{after}",
            evaluation=evaluation,
            compression=name,
            keep=keep,
        )
        for name in names
        for keep in keeps
    )


def _full(evaluation: str, after: str = "") -> Column:
    return Column(title=f"full{after}", evaluation=evaluation, compression="none")


TABLES: Mapping[str, Page] = {
    "dms": Page(
        title="DMS",
        text="`dms` is `kvjax-tiny` trained to give up three tokens of four, each 16 "
        "tokens after it was read; *immediate* is the same training and evaluation "
        "with a delay of one token. Beside them the base model under methods without "
        "training, at the same slots per layer. *full, trained* has every token "
        "visible, for which the model was not trained.",
        columns=(
            _full("dms-base"),
            *_columns("dms-dms", "dms", keeps=(0.25, 0.125)),
            *_columns(
                "dms-dms-immediate", "dms", keeps=(0.25, 0.125), after=", immediate"
            ),
            *_columns("dms-base", "h2o", "tova", keeps=(0.25, 0.125)),
            _full("dms-dms", ", trained"),
        ),
    ),
    "matryoshka": Page(
        title="Matryoshka projections",
        text="Keys and values are cut to a leading share of their coefficients. "
        "*trained* are the projections of the recipe `matryoshka`, *start* the "
        "principal components that it starts from. The model itself stays as it is.",
        columns=(
            _full("matryoshka-matryoshka"),
            *_columns(
                "matryoshka-matryoshka",
                "matryoshka",
                keeps=(0.5, 0.375, 0.25, 0.125),
                after=", trained",
            ),
            *_columns(
                "matryoshka-matryoshka-start",
                "matryoshka",
                keeps=(0.5, 0.375, 0.25, 0.125),
                after=", start",
            ),
        ),
    ),
    "duo": Page(
        title="DuoAttention gates",
        text="Half of the KV heads, chosen by the trained gates, keep all tokens; the "
        "others keep 4 sinks and the newest 64 tokens of the prompt, an eighth of it. "
        "The model itself stays as it is. Beside it methods without training that keep "
        "half of the tokens in all heads.",
        columns=(
            _full("duo-duo"),
            *_columns(
                "duo-duo", "duo", "snapkv", "streaming_llm", "random", keeps=(0.5,)
            ),
        ),
    ),
    "surrogate": Page(
        title="Surrogate scores",
        text="A small network beside each layer predicts what later questions will "
        "look at; the model itself stays as it is. The question is hidden from all "
        "scores.",
        columns=(
            _full("surrogate-surrogate"),
            *_columns(
                "surrogate-surrogate",
                "surrogate",
                "snapkv",
                "expected_attention",
                "keydiff",
                keeps=(0.25, 0.125),
            ),
        ),
    ),
}
SEEDS = ("", "-seed1")
"""What the names of evaluations end on, by seed; columns name those of the first."""


def score_tables(page: str, found: Mapping[str, Found]) -> list[str]:
    """A page of `TABLES`, a table per seed; what was not measured is left out."""
    it = TABLES[page]
    lines = [f"# {it.title}", "", it.text]
    for seed, after in enumerate(SEEDS):
        names = [f"{column.evaluation}{after}" for column in it.columns]
        columns = [
            dataclasses.replace(column, evaluation=name)
            for column, name in zip(it.columns, names, strict=True)
            if name in found
        ]
        if columns:
            lines += ["", f"## Seed {seed}", "", *_rows(columns, found)]
    return lines


def _rows(columns: Sequence[Column], found: Mapping[str, Found]) -> list[str]:
    """Accuracies in percent, their mean, and the bytes of the cache."""
    first = found[columns[0].evaluation]
    groups = list(dict.fromkeys(cell[:2] for cell in first.scores))
    lines = [
        "| task | visibility | " + " | ".join(c.title for c in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]

    def line(name: str, seen: str, values: Sequence[float | None], form: str) -> None:
        shown = " | ".join("" if v is None else format(v, form) for v in values)
        lines.append(f"| {name} | {seen} | {shown} |")

    def each(which: str, column: Column) -> list[float | None]:
        cells = getattr(found[column.evaluation], which)
        return [cells.get((*g, column.compression, column.keep)) for g in groups]

    table = [each("scores", column) for column in columns]
    for index, (task, seen) in enumerate(groups):
        line(
            task,
            seen,
            [_mean(column[index : index + 1], 100) for column in table],
            ".1f",
        )
    line("mean", "", [_mean(column, 100) for column in table], ".1f")
    held = [_mean(each("bytes", column), 1 / 1024) for column in columns]
    line("KiB per prompt", "", held, ".0f")
    return lines


def _mean(values: Sequence[float | None], factor: float) -> float | None:
    there = [value for value in values if value is not None]
    return factor * statistics.fmean(there) if there else None


def conditions(headers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How evaluations were run, by their `run.json`; all values where they differ."""
    rows = [
        {
            "items per cell": header["config"]["items"],
            "tokens": " ".join(map(str, header["config"]["lengths"])),
            "dtype": header["dtype"],
            "JAX": header["jax"],
            "device": header["device"],
            "date": header["date"][:10],
        }
        for header in headers
    ]
    return {
        key: " and ".join(dict.fromkeys(str(row[key]) for row in rows))
        for key in rows[0]
    }
