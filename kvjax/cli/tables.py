"""Rows of an evaluation as tables for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]


def print_table(console: Console, table: Table) -> None:
    """Print a table at the width it needs: numbers are never cut."""
    table.width = needed(console, table)
    console.print(table, crop=False, no_wrap=True, overflow="ignore", soft_wrap=True)


def needed(console: Console, table: Table) -> int:
    """Columns of text that a table needs."""
    wide = console.options.update(max_width=1000)
    return Measurement.get(console, wide, table).maximum


def print_scores(console: Console, rows: Sequence[Row]) -> None:
    """One table per length and visibility: methods down, tasks across, in percent.

    A terminal too narrow for standard errors gets the scores without.
    """
    several = len({row["visibility"] for row in rows}) > 1
    for (length, visibility), same in _groups(rows, "length", "visibility"):
        tail = f", {visibility}" if several else ""
        table = _table(same, f"{length} tokens{tail}: score in % ± standard error")
        if console.is_terminal and needed(console, table) > console.width:
            table = _table(same, f"{length} tokens{tail}: score in %", errors=False)
        print_table(console, table)
        console.print()


def print_gains(console: Console, before: Sequence[Row], after: Sequence[Row]) -> None:
    """Scores of two models in the cells that both have, methods down, tasks across."""
    found = {_cell(row): row["score"] for row in after}
    pairs = [(row, found[_cell(row)]) for row in before if _cell(row) in found]
    tasks = list(dict.fromkeys(row["task"] for row, _ in pairs))
    table = Table(
        title="before and after training: score in %",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("compression", no_wrap=True)
    for name in ("keep", *tasks):
        table.add_column(name, justify="right", no_wrap=True)
    for name, keep in dict.fromkeys((r["compression"], r["keep"]) for r, _ in pairs):
        cells = []
        for task in tasks:
            own = [
                (row["score"], score)
                for row, score in pairs
                if (row["compression"], row["keep"], row["task"]) == (name, keep, task)
            ]
            means = [100 * sum(side) / len(own) for side in zip(*own, strict=True)]
            cells.append(f"{means[0]:.0f} -> {means[1]:.0f}" if own else "")
        table.add_row(name, "" if keep is None else f"{keep:g}", *cells)
    print_table(console, table)


def _cell(row: Row) -> tuple[Any, ...]:
    names = ("task", "length", "visibility", "compression", "keep", "depth")
    return tuple(row[name] for name in names)


def print_dry_run(console: Console, result: Mapping[str, Any]) -> None:
    """What compilers say of the steps of a recipe: a line per compression."""
    known = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    table = Table(
        title=f"{result['chips']} x {result['device']}: compiled, not run; {known}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("compression", no_wrap=True)
    names = ("arguments", "outputs", "temporaries", "total")
    heads = ("rows", "width", *(f"{n} GiB" for n in names), "HBM GiB")
    for head in (*heads, "matmul TFLOP", "status", "s"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["compression"],
            str(row["rows"]),
            str(row["width"]),
            *(_scaled(row[name], 1 << 30) for name in (*names, "hbm")),
            _scaled(row["matmul_flops"], 10**12),
            row["status"],
            f"{row['compile_s']:.0f}",
        )
    print_table(console, table)
    for row in result["rows"]:
        if row["reason"]:
            console.print(f"{row['compression']}: {row['reason']}", soft_wrap=True)
    console.print(
        "bytes are of one device, operations of all of them; outputs in place of "
        "arguments do not count again in the total",
        soft_wrap=True,
    )


def _scaled(value: int | None, unit: int) -> str:
    return "-" if value is None else f"{value / unit:.2f}"


def _groups(rows: Sequence[Row], *names: str) -> Iterator[tuple[Any, list[Row]]]:
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in rows)
    for key in keys:
        yield key, [row for row in rows if tuple(row[n] for n in names) == key]


def _table(rows: Sequence[Row], title: str, errors: bool = True) -> Table:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("compression", no_wrap=True)
    for name in ("keep", *tasks, "agree", "KiB", "ms/tok"):
        table.add_column(name, justify="right", no_wrap=True)
    for (name, keep), own in _groups(rows, "compression", "keep"):
        by_task = {task: [r for r in own if r["task"] == task] for task in tasks}
        cells = [percent(same, errors) for same in by_task.values()]
        size, step = _mean(own, "resident_bytes"), _mean(own, "ms_per_token")
        table.add_row(
            Text(name),
            "" if keep is None else f"{keep:g}",
            *cells,
            _percent(_mean(own, "agreement")),
            "" if size is None else f"{size / 1024:.0f}",
            "" if step is None else f"{step:.2f}",
        )
    return table


def percent(rows: Sequence[Row], errors: bool = True) -> str:
    """`92±2` of the mean of some rows; what else they measured if not a score."""
    score = _mean(rows, "score")
    if score is None:
        kl = _mean(rows, "kl")
        return "" if kl is None else f"KL {kl:.2g}"
    if not errors:
        return f"{100 * score:.0f}"
    each = [row.get("score_se") or 0.0 for row in rows]
    error = sum(e * e for e in each) ** 0.5 / len(each)
    return f"{100 * score:.0f}±{100 * error:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def held_label(row: Mapping[str, Any]) -> str:
    """KiB of a cache on its device, and in the host's memory if any are there."""
    host = row["host_bytes"]
    here = f"{(row['resident_bytes'] - host) / 1024:.0f}"
    return f"{here} + {host / 1024:.0f} on the host" if host else here
