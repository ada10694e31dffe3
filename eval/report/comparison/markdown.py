"""Tables of Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(
    heads: Sequence[str], align: str, rows: Iterable[Sequence[str]]
) -> list[str]:
    """Lines of a table; `align` says of every column whether it is `l` or `r`."""
    rules = {"l": "---|", "r": "---:|"}
    lines = [_line(heads), "|" + "".join(rules[side] for side in align)]
    return lines + [_line(row) for row in rows]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
