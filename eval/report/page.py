"""The report's HTML page: parts as text, everything inlined, everything escaped."""

import importlib.resources
import json
from collections.abc import Iterable, Sequence
from typing import Any

from kvjax.eval.report.flow import escape as escape
from kvjax.eval.report.run import CellRow, LoadedRun
from kvjax.summary import bytes_label

_WORDS = ("task", "compression", "visibility")
_TABLE = {
    "task": "task",
    "length": "length",
    "depth": "depth",
    "compression": "method",
    "keep": "keep",
    "visibility": "visibility",
    "items": "items",
    "score": "score",
    "score_se": "± SE",
    "agreement": "agreement",
    "agreement_se": "± SE",
    "resident_bytes": "resident",
    "full_bytes": "full",
    "host_bytes": "of it on the host",
    "prefill_ms": "prefill ms",
    "compress_ms": "compress ms",
    "ms_per_token": "ms/token",
    "compile_s": "compile s",
    "nll": "NLL",
    "kl": "KL",
}
CAVEATS = (
    "Prefill is not compressed: a reply's first token comes from the whole prompt. "
    "Answers have at least two tokens, so each of them is decoded from the compressed "
    "cache too, but its first token tells nothing about the method.",
    "Resident bytes are what the cache holds after compression and before the first "
    "token, per sequence: keys, values, positions, scales and other side state; slots "
    "reserved for tokens to come are included. Weights and activations are not. Where "
    "bodies lie in the host's memory, a column says how many of these bytes are there.",
    "Error bars are one standard error over items. Methods saw the same items, so "
    "differences between them are better known than the bars suggest.",
    "Times are of this machine and this shape, compilation left out. They do not carry "
    "over to another device.",
)


def page(run: LoadedRun, sections: Iterable[tuple[str, str, str]]) -> str:
    """The whole document; `sections` are `(anchor, heading, body)`."""
    parts = list(sections)
    title = f"kvjax report: {run.about.get('model', run.path.name)}"
    links = "".join(f'<a href="#{a}">{escape(h)}</a>' for a, h, _ in parts)
    body = "".join(
        f'<section id="{a}"><h2>{escape(h)}</h2>{b}</section>' for a, h, b in parts
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}{_asset('flow.css')}</style></head>"
        f"<body><header><h1>{escape(title)}</h1>{_lead(run)}<nav>{links}</nav></header>"
        f"<main>{body}</main><footer>Made by <code>kvjax report</code> from "
        f"{len(run.rows)} cells.</footer>"
        f'<div id="tip" hidden></div><script>{_asset("page.js")}</script></body></html>'
    )


def _lead(run: LoadedRun) -> str:
    tasks = sorted({row["task"] for row in run.rows})
    names = {row["compression"] for row in run.rows}
    date = str(run.about.get("date"))[:10]
    about = f"{len(names)} methods on {', '.join(tasks)}; {run.about.get('device')}"
    return f'<p class="lead">{escape(about)}, {escape(date)}</p>'


def _asset(name: str) -> str:
    folder = importlib.resources.files("kvjax") / "eval" / "report" / "assets"
    return (folder / name).read_text(encoding="utf-8")


def empty(why: str) -> str:
    """A section that has nothing to show, and why."""
    return f'<p class="empty">{escape(why)}</p>'


def plots(images: Sequence[str], kind: str = "") -> str:
    """Inline figures as a grid that folds into one column."""
    figures = "".join(f'<figure class="plot">{image}</figure>' for image in images)
    return f'<div class="plots {kind}">{figures}</div>'


def table(rows: Sequence[CellRow]) -> str:
    """All rows; a click on a heading sorts."""
    used = [n for n in _TABLE if any(row.get(n) is not None for row in rows)]
    heads = "".join(
        f'<th scope="col"{_word(n)}><button type="button">{_TABLE[n]}</button></th>'
        for n in used
    )
    lines = "".join(
        f"<tr>{''.join(_cell(n, row.get(n)) for n in used)}</tr>" for row in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>'
        f"{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _word(name: str) -> str:
    return ' class="word"' if name in _WORDS else ""


def _cell(name: str, value: Any) -> str:
    raw = "" if value is None else escape(value)
    return f'<td{_word(name)} data-value="{raw}">{escape(shown(name, value))}</td>'


def shown(name: str, value: Any) -> str:
    """A value of a column as people read it."""
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return bytes_label(value)
    if isinstance(value, float):
        digits = 3 if name.startswith(("score", "agree", "nll", "kl")) else 2
        return f"{value:g}" if name in ("keep", "depth") else f"{value:.{digits}f}"
    return str(value)


def provenance(run: LoadedRun) -> str:
    """Where the numbers come from, and what they do not say."""
    long = ("config", "inputs", "checkpoint")
    about = {key: value for key, value in run.about.items() if key not in long}
    seeds = sorted({row["seed"] for row in run.rows if row.get("seed") is not None})
    if seeds:
        about["seeds"] = ", ".join(map(str, seeds))
    about["cells"] = len(run.rows)
    lines = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in about.items()
    )
    config = escape(json.dumps(run.about.get("config", {}), indent=2))
    caveats = "".join(f"<li>{escape(text)}</li>" for text in CAVEATS)
    return (
        f'<table class="about"><tbody>{lines}</tbody></table>'
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
        f"<h3>Read with care</h3><ul>{caveats}</ul>"
    )
