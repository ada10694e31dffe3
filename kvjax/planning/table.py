"""A plan as a table: a row per compression, and the largest contexts of chips."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kvjax.planning.chips import Chip
from kvjax.planning.record import Plan, Row
from kvjax.planning.words import layers_text, name_of, size

SIGNS = {"shapes": "", "formula": "~", "compiled": "c "}
"""In front of a number, by its mark."""

BYTES = (
    ("weights", "weights"),
    ("codes", "codes"),
    ("scales", "scales"),
    ("positions", "positions"),
    ("tail", "tail"),
    ("statistics", "statistics"),
    ("decode_temporaries", "decode +"),
    ("prefill_temporaries", "prefill +"),
    ("peak", "peak"),
    ("free", "free"),
    ("read", "read/token"),
)


def tables(plan: Plan) -> list[Table]:
    """One per chip; of several chips one more, of largest contexts."""
    found = [_chip(plan, chip) for chip in plan.chips]
    return [_matrix(plan), *found] if len(plan.chips) > 1 else found


def _new(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )


def _chip(plan: Plan, chip: Chip) -> Table:
    rows = plan.of(chip.name)
    unit, of = ("GB", 10**9) if max(r.peak for r in rows) >= 10**9 else ("MB", 10**6)
    mesh = "".join(f", {axis} {n}" for axis, n in plan.mesh.items())
    table = _new(
        f"{chip.name}{mesh}: {size(chip.memory)} for programs; {plan.dtype}, "
        f"{plan.context:,} tokens, batch {plan.batch:,}; {unit} per chip"
    )
    columns = [(n, h) for n, h in BYTES if n != "statistics" or _any(rows, n)]
    table.add_column("compression", no_wrap=True)
    heads = (*(h for _, h in columns), "ms/token", "prefill s", "context", "batch")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for name, _ in columns:
            sign = SIGNS[row.marks["peak" if name == "free" else name]]
            cells.append(f"{sign}{getattr(row, name) / of:,.2f}")
        table.add_row(
            name_of(row) + ("" if row.fits else " (no)"),
            *cells,
            "-" if row.ms_per_token is None else f"~{row.ms_per_token:,.2f}",
            "-" if row.prefill_s is None else f"~{row.prefill_s:,.2f}",
            f"~{row.largest_context:,}",
            f"~{row.largest_batch:,}" + ("+" if row.batch_bound == "search" else ""),
        )
    return table


def _any(rows: Sequence[Row], name: str) -> bool:
    return any(getattr(row, name) for row in rows)


def _matrix(plan: Plan) -> Table:
    table = _new(
        f"largest context at batch {plan.batch:,} (~), and whether {plan.context:,} "
        "tokens fit"
    )
    table.add_column("compression", no_wrap=True)
    for chip in plan.chips:
        head = f"{chip.name} ({size(chip.memory)})"
        table.add_column(head, justify="right", no_wrap=True)
    lines: dict[str, dict[str, str]] = {}
    for row in plan.rows:
        said = f"{row.largest_context:,} {'fits' if row.fits else 'no  '}"
        lines.setdefault(name_of(row), {})[row.device] = said
    for name, cells in lines.items():
        table.add_row(name, *(cells.get(chip.name, "-") for chip in plan.chips))
    return table


def remarks(plan: Plan) -> list[str]:
    """What the tables do not say: layers that differ, notes, where numbers are from."""
    said = []
    for row in plan.rows:
        at = f"{name_of(row)} on {row.device}" if len(plan.chips) > 1 else name_of(row)
        for text in (layers_text(row.layers), *row.notes):
            if text:
                said.append(f"{at}: {text}")
    known = ", ".join(f"{k} {v}" for k, v in plan.versions.items())
    legend = "unmarked: bytes of the library's own arrays, by their shapes; ~ formula"
    if known:
        legend += f"; c compiled for the chip, not run ({known})"
    said.append(
        f"{legend}. GB = 10^9 bytes. decode + and prefill +: temporaries; read/token: "
        "by one decode step, at most; ms/token and prefill s: floors at the chip's "
        "bandwidth and rate; context, batch: the largest that fit."
    )
    return list(dict.fromkeys(said))


def as_text(plan: Plan) -> str:
    """The tables and remarks, as wide as they need."""
    out = io.StringIO()
    console = Console(file=out, width=400, markup=False)
    for table in tables(plan):
        console.print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([*lines, "", *remarks(plan)])
