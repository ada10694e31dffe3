"""Bring docs/kernels/<op>.md up to the code: `python tools/kernel_pages.py`.

What a page says by hand stays; between the two marks stand the signature, the
arguments, the cost, the backends and the tuned block sizes of the op, as its `api.py`
and its data have them. A page that is missing is begun. A test keeps pages current.
"""

import importlib
import inspect
import pathlib
import re
import textwrap
from typing import Any

from kvjax.pallas_kernels import tuning
from kvjax.pallas_kernels.registry import OPS

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "docs" / "kernels"
BEGIN, END = "<!-- from api.py: run tools/kernel_pages.py -->", "<!-- end -->"
SECTIONS = ("Args", "Returns", "Raises", "Cost", "Source")
WIDTH = 88


def sections(text: str) -> dict[str, str]:
    """The parts of a docstring by their names; what comes first under ``""``."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        head = re.match(rf"({'|'.join(SECTIONS)}):(.*)", line)
        if head:
            name = head.group(1)
            found[name] = [head.group(2)]
        else:
            found[name].append(line)
    return {n: textwrap.dedent("\n".join(v)).strip("\n") for n, v in found.items()}


def entries(text: str) -> list[tuple[str, str]]:
    """`name: words` per argument, continuation lines joined."""
    pairs = re.findall(r"^(\w+): (.*(?:\n[ \n].*)*)", text, re.MULTILINE)
    return [(name, " ".join(words.split())) for name, words in pairs]


def signature(name: str, function: Any) -> str:
    """Names and defaults; the shapes stand in the table below."""
    words, starred = [], False
    for one in inspect.signature(function).parameters.values():
        if one.kind is one.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        empty = one.default is inspect.Parameter.empty
        words.append(one.name if empty else f"{one.name}={one.default!r}")
    text = textwrap.fill(
        f"{name}({', '.join(words)})", WIDTH - 4, subsequent_indent="    "
    )
    return textwrap.indent(text, "    ")


def paragraph(text: str) -> str:
    """Words of a section, wrapped anew."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False)


def derived(name: str) -> str:
    """What of a page follows from the code."""
    function = getattr(importlib.import_module(f"kvjax.pallas_kernels.{name}"), name)
    parts = sections(inspect.getdoc(function) or "")
    rows = [
        f"| `{n}` | {t.replace('|', chr(92) + '|')} |"
        for n, t in entries(parts["Args"])
    ]
    blocks = [
        BEGIN,
        "## Signature",
        signature(name, function),
        paragraph(f"Backends: {', '.join(f'`{b}`' for b in OPS[name].backends)}."),
        "\n".join(["| argument | |", "|---|---|", *rows]),
        paragraph(f"Returns: {parts.get('Returns', '')}"),
        paragraph(f"Cost: {parts.get('Cost', '')}"),
    ]
    if "Source" in parts:
        blocks.append(paragraph(f"Source: {parts['Source']}"))
    try:
        table = tuning.table(name)
    except FileNotFoundError:
        pass
    else:
        blocks.append("## Block sizes")
        sizes = {k: v for k, v in table.items() if isinstance(v, dict)}
        blocks.append(
            "\n".join(["| chip | sizes |", "|---|---|"])
            + "".join(f"\n| {chip} | `{tiles}` |" for chip, tiles in sizes.items())
        )
        blocks.append(paragraph(table.get("source", "")))
    return "\n\n".join([*blocks, END])


def page(name: str) -> str:
    """The whole page: the hand-written parts as they are."""
    path = FOLDER / f"{name}.md"
    text = f"# {name}\n\n![What it reads](figures/{name}.svg)\n\n{BEGIN}\n{END}\n"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + derived(name) + rest.partition(END)[2]


if __name__ == "__main__":
    for op in OPS:
        (FOLDER / f"{op}.md").write_text(page(op), encoding="utf-8")
