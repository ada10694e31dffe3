"""The report's HTML page: parts as text, everything inlined, everything escaped."""

import html
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvjax.eval.report.run import CellRow, LoadedRun
from kvjax.eval.report.token_map import (
    heads_kept,
    pieces_of,
    question_pieces,
    visible,
)
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
    "reserved for tokens to come are included. Weights and activations are not.",
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
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head>"
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


def escape(value: Any) -> str:
    """`value` as text that is text in HTML, attributes included."""
    return html.escape(str(value), quote=True)


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


def token_section(maps: Sequence[Mapping[str, Any]]) -> str:
    """The text of one item, method by method, with bands per layer."""
    heads = max(len(layer) for entry in maps for layer in entry["kept"])
    layers = max(len(entry["kept"]) for entry in maps)
    steps = "".join(
        f'<i style="background:rgba(var(--cell),{0.07 + 0.93 * n / heads:.2f})"></i>'
        for n in range(heads + 1)
    )
    asked = any(question_pieces(entry) for entry in maps)
    asked = "<span>line above: the question</span>" if asked else ""
    legend = (
        f'<p class="legend"><span>0 <span class="scale">{steps}</span> {heads} '
        f"KV heads kept it</span><span>bands: layers 0 to {layers - 1}, top down</span>"
        f"{asked}<span>point at a character for its heads</span></p>"
    )
    return legend + "".join(_map(entry) for entry in maps)


def _map(entry: Mapping[str, Any]) -> str:
    pieces = [visible(piece) for piece in pieces_of(entry)]
    counts = heads_kept(entry["kept"], len(pieces))
    total = sum(len(layer) for layer in entry["kept"]) * len(pieces)
    name = f"{entry['compression']}, {entry['task']}"
    if entry.get("keep") is not None:
        name += f", keep {entry['keep']:g}"
    start = len(pieces) - question_pieces(entry)
    data = {"pieces": pieces, "kept": entry["kept"], "question": start}
    # Nothing inside may end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f"<h3>{escape(name)} <span class='note'>({100 * counts.sum() / total:.0f} % of "
        "the slots of all heads)</span></h3>"
        f'<div class="map"></div><script type="application/json" class="tokens">{text}'
        "</script>"
    )


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
