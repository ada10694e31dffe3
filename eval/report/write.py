"""`write_report`: a run directory in, one page and its figures as PNG files out."""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure

from kvjax.eval.report import page
from kvjax.eval.report.curves import cost_figure, score_figure
from kvjax.eval.report.needle import needle_figure
from kvjax.eval.report.run import CellRow, LoadedRun, group, load_run, methods
from kvjax.eval.report.style import look, png, svg
from kvjax.eval.report.token_map import pieces_of, token_map
from kvjax.files import write_bytes, write_text
from kvjax.places import check_place

MOST_MAPS = 8
LONGEST_MAP = 4096

Named = Iterator[tuple[str, Figure]]


def write_report(
    directory: str | pathlib.Path, out: str | pathlib.Path | None = None
) -> pathlib.Path:
    """Write the report of a run.

    Args:
        directory: of an evaluation, finished or not.
        out: folder for `report.html` and the PNG files; None: `report/` in the run.

    Returns:
        The path of the page, which needs no other file and no network.

    Raises:
        ValueError: the directory is not one of an evaluation, or is damaged.
    """
    folder = pathlib.Path(directory) / "report" if out is None else pathlib.Path(out)
    run = load_run(directory)
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        ("score", "Score against bytes", _scores(run, folder)),
        ("text", "Fidelity on text", _fidelity(run, folder)),
        ("time", "Time per token against bytes", _times(run, folder)),
        ("tokens", "Which tokens were kept", _tokens(run, folder)),
        ("needle", "Needle in a haystack", _needles(run, folder)),
        ("rows", "All rows", page.table(_ordered(run))),
        ("provenance", "Where the numbers come from", page.provenance(run)),
    ]
    target = folder / "report.html"
    write_text(target, page.page(run, sections))
    return target


def _ordered(run: LoadedRun) -> list[CellRow]:
    order = methods(run.rows)
    return sorted(
        run.rows,
        key=lambda row: (
            row["task"],
            row["length"] or 0,
            order.index(row["compression"]),
            -(row.get("keep") or 2),
            row.get("depth") or 0,
        ),
    )


def _figures(figures: Named, folder: pathlib.Path, kind: str = "") -> str:
    images = []
    for name, figure in figures:
        name = re.sub(r"[^\w.-]+", "_", name)
        write_bytes(folder / f"{name}.png", png(figure))
        images.append(svg(figure, name, page.escape(name.replace("_", " "))))
    return page.plots(images, kind)


def _scores(run: LoadedRun, folder: pathlib.Path) -> str:
    """One panel per task, length and visibility."""
    rows = [r for r in run.rows if r.get("resident_bytes") and r["score"] is not None]
    if not rows:
        return page.empty("No row has both a score and resident bytes.")
    looks = look(methods(run.rows))

    def figures() -> Named:
        several = len({row.get("visibility") for row in rows}) > 1
        for key, same in group(rows, "task", "length", "visibility").items():
            task, length, visibility = key
            tail = f", {visibility}".replace("_", "-") if several else ""
            title = f"{task}, {length} tokens{tail}"
            yield f"score_{task}_{length}{tail}", score_figure(same, title, looks)

    note = (
        "<p class='note'>Up and to the left is better. The dotted line is the model "
        "without compression; the grey band ends at random eviction, the floor at "
        "equal bytes. Bars: one standard error over items.</p>"
    )
    return note + _figures(figures(), folder)


def _fidelity(run: LoadedRun, folder: pathlib.Path) -> str:
    """Teacher-forced text: divergence from the uncompressed model."""
    rows = [r for r in run.rows if r.get("kl") is not None and r.get("resident_bytes")]
    if not rows:
        return page.empty("This run has no fidelity task (`--tasks text`).")
    looks = look(methods(run.rows))

    def figures() -> Named:
        for (task, length), same in group(rows, "task", "length").items():
            title, label = f"{task}, {length} tokens", "KL, nats per token"
            figure = cost_figure(same, "kl", label, title, looks)
            yield f"fidelity_{task}_{length}", figure

    note = (
        "<p class='note'>How far the next-token distribution is from that of the "
        "uncompressed model; lower is better.</p>"
    )
    return note + _figures(figures(), folder)


def _times(run: LoadedRun, folder: pathlib.Path) -> str:
    """One panel per length, mean over tasks."""
    rows = [r for r in run.rows if r.get("ms_per_token") and r.get("resident_bytes")]
    if not rows:
        return page.empty("No row has a time per token.")
    looks = look(methods(run.rows))

    def figures() -> Named:
        for (length,), same in group(rows, "length").items():
            title = f"{length} tokens, mean over tasks"
            figure = cost_figure(same, "ms_per_token", "ms per token", title, looks)
            yield f"time_{length}", figure

    device = page.escape(run.about.get("device"))
    note = f"<p class='note'>On {device}; down and to the left is better.</p>"
    return note + _figures(figures(), folder)


def _tokens(run: LoadedRun, folder: pathlib.Path) -> str:
    """One item, each method at one budget."""
    maps = chosen_maps(run)
    if not maps:
        return page.empty(
            "This run recorded no kept tokens (maps/): no method of it evicts, or maps "
            "were turned off."
        )
    for entry in maps:
        name = re.sub(
            r"[^\w.-]+", "_", f"tokens_{entry['task']}_{entry['compression']}"
        )
        title = f"{entry['compression']}, {entry['task']}"
        figure = token_map(entry, pieces_of(entry), title=title.replace("$", r"\$"))
        write_bytes(folder / f"{name}.png", png(figure))
    return page.token_section(maps)


def chosen_maps(run: LoadedRun) -> list[Mapping[str, Any]]:
    """Maps of one text: the task most methods share, each at its middle budget."""
    by_text: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in run.maps:
        evicts = len({len(p) for layer in entry["kept"] for p in layer}) > 1 or any(
            len(p) < len(pieces_of(entry)) for layer in entry["kept"] for p in layer
        )
        if evicts and len(entry["text"]) <= LONGEST_MAP:
            by_text.setdefault((entry["task"], entry["text"]), []).append(entry)
    if not by_text:
        return []
    # The text that most entries show, of the task that comes first.
    tasks = list(dict.fromkeys(entry["task"] for entry in _listed(run)))
    best = max(by_text, key=lambda key: (len(by_text[key]), -tasks.index(key[0])))
    out = []
    for entries in group(by_text[best], "compression").values():
        ranked = sorted(entries, key=lambda entry: entry.get("keep") or 1.0)
        out.append(ranked[len(ranked) // 2])
    out.sort(key=lambda entry: entry["compression"] == "random")
    return out[:MOST_MAPS]


def _listed(run: LoadedRun) -> list[Mapping[str, Any]]:
    """Rows, those of tasks that the configuration names first before others."""
    tasks = run.about.get("config", {}).get("tasks", ())
    named = [t.get("label") or t["name"] for t in tasks if isinstance(t, Mapping)]
    ranks = {name: rank for rank, name in enumerate(named)}
    rows = [*run.rows, *run.maps]
    return sorted(rows, key=lambda row: ranks.get(row["task"], len(ranks)))


def _needles(run: LoadedRun, folder: pathlib.Path) -> str:
    """Depth against length, one figure per task and method."""
    rows = [row for row in run.rows if row.get("depth") is not None]
    if not rows:
        return page.empty(
            "This run has no rows with a depth. Evaluate one that has (`--tasks "
            "niah`) to fill this section."
        )

    def figures() -> Named:
        for task, same in group(rows, "task").items():
            for name in methods(same):
                own = [row for row in same if row["compression"] == name]
                title = f"{task[0]}: {name}".replace("$", r"\$")
                yield f"needle_{task[0]}_{name}", needle_figure(own, title)

    note = "<p class='note'>Score in percent; 0 is the start of the text.</p>"
    return note + _figures(figures(), folder, "needles")
