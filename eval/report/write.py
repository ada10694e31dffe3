"""`write_report`: a run directory in, one page and its figures as PNG files out."""

import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from kvjax.eval.report import page
from kvjax.eval.report.chosen import (
    chosen_maps,
    chosen_pairs,
    in_full,
    told_maps,
    watched_maps,
    weighed_maps,
)
from kvjax.eval.report.curves import cost_figure, score_figure
from kvjax.eval.report.kept import label_of, pieces_of
from kvjax.eval.report.leaving import departure_figure, departures_of, leaving_section
from kvjax.eval.report.needle import needle_figure, needle_words
from kvjax.eval.report.pair_page import pair_section
from kvjax.eval.report.pairs import difference_map
from kvjax.eval.report.run import CellRow, LoadedRun, group, load_run, methods
from kvjax.eval.report.strips import kl_figure, kl_map, strip_section
from kvjax.eval.report.style import look, png, svg
from kvjax.eval.report.token_map import token_map
from kvjax.eval.report.token_page import token_section
from kvjax.eval.report.worth import TokenWorth, worth_section
from kvjax.files import write_bytes, write_text
from kvjax.places import check_place

Named = Iterator[tuple[str, Figure]]


def write_report(
    directory: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
    *,
    compare: Sequence[str] | None = None,
) -> pathlib.Path:
    """Write the report of a run.

    Args:
        directory: of an evaluation, finished or not.
        out: folder for `report.html` and the PNG files; None: `report/` in the run.
        compare: names of two methods whose kept tokens are shown side by side; None:
            the first two of the run.

    Returns:
        The path of the page, which needs no other file and no network.

    Raises:
        ValueError: the directory is not one of an evaluation, or is damaged; it has no
            kept tokens of the methods to compare.
    """
    folder = pathlib.Path(directory) / "report" if out is None else pathlib.Path(out)
    run = load_run(directory)
    chosen_pairs(run, compare)  # before anything is written
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        ("score", "Score against bytes", _scores(run, folder)),
        ("text", "Fidelity on text", _fidelity(run, folder)),
        ("time", "Time per token against bytes", _times(run, folder)),
        ("tokens", "Which tokens were kept", _tokens(run, folder)),
        ("pairs", "Two methods side by side", _pairs(run, folder, compare)),
        ("leaving", "When tokens left", _leaving(run, folder)),
        ("worth", "What tokens are worth", _worth(run, folder)),
        ("needle", "Needle in a haystack", _needles(run, folder)),
        ("rows", "All rows", page.table(_ordered(run))),
        ("provenance", "Where the numbers come from", page.provenance(run)),
    ]
    write_text(folder / "report.html", page.page(run, sections))
    return folder / "report.html"


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
        name = _plain(name)
        _keep(folder, name, figure)
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
    return note + _figures(figures(), folder) + _told(run, folder)


def _told(run: LoadedRun, folder: pathlib.Path) -> str:
    """Divergence token by token, of one text."""
    maps = told_maps(run)
    if not maps:
        return ""
    kl = {entry["compression"]: entry["following"]["kl"] for entry in maps}
    task, pieces = maps[0]["task"], maps[0]["following"]["tokens"][1:]
    title = f"KL token by token, {task}"
    _keep(folder, f"kl_by_token_{task}", kl_map(pieces, kl, title=title))
    along = (f"kl_along_{task}", kl_figure(kl, title=title))
    return _figures(iter([along]), folder, "wide") + strip_section(maps)


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
            "This run recorded no kept tokens (maps/): no method of it evicts, or its "
            "texts are too long."
        )
    for entry in maps[: in_full(len(pieces_of(maps[0])))]:
        title = f"{label_of(entry)}, {entry['task']}"
        name = f"tokens_{entry['task']}_{entry['compression']}"
        _keep(folder, name, token_map(entry, pieces_of(entry), title=title))
    return token_section(maps)


def _pairs(run: LoadedRun, folder: pathlib.Path, compare: Sequence[str] | None) -> str:
    """Two methods at one text and budget."""
    pairs = chosen_pairs(run, compare)
    if not pairs:
        return page.empty(
            "This run has no two methods that evict, on one text at one budget."
        )
    for one, other in pairs:
        names = (one["compression"], other["compression"])
        figure = difference_map(one, other, pieces_of(one), names=names)
        short = "_".join(name[:60] for name in (one["task"], *names))
        _keep(folder, f"difference_{short}", figure)  # names of files are short
    return pair_section(pairs)


def _leaving(run: LoadedRun, folder: pathlib.Path) -> str:
    """Tokens against time."""
    maps, images = watched_maps(run), []
    if not maps:
        return page.empty(
            "No method of this run evicts while decoding (`schedule: every_tokens`, as "
            "in h2o_decode)."
        )
    for entry in maps:
        found, _ = departures_of(entry)
        title = f"{label_of(entry)}, {entry['task']}"
        figure = departure_figure(found, title=title)
        name = f"departures_{entry['task']}_{entry['compression']}"
        images.append(svg(figure, _plain(name), page.escape(f"departures, {title}")))
        _keep(folder, name, figure)
    return leaving_section(maps, images)


def _worth(run: LoadedRun, folder: pathlib.Path) -> str:
    """What tokens are worth, where that was computed."""
    maps = weighed_maps(run)
    if not maps:
        return page.empty(
            "This run does not know what tokens are worth: evaluate the preset "
            "`oracle`, too, on a text that is not too long."
        )
    entry = maps[0]
    worth = np.stack([np.array(layer) for layer in entry["worth"]])
    made = TokenWorth(worth=worth, pieces=tuple(pieces_of(entry)))
    title = f"What tokens are worth, {entry['task']}"
    _keep(folder, f"worth_{entry['task']}", made.figure(title=title))
    return worth_section(maps)


def _keep(folder: pathlib.Path, name: str, figure: Figure) -> None:
    write_bytes(folder / f"{_plain(name)}.png", png(figure))


def _plain(name: str) -> str:
    """As a file can be called."""
    return re.sub(r"[^\w.-]+", "_", name)


def _needles(run: LoadedRun, folder: pathlib.Path) -> str:
    """Depth against length, one figure per task and method."""
    rows = [row for row in run.rows if row.get("depth") is not None]
    if not rows:
        return page.empty(
            "This run has no rows with a depth. Evaluate one that has (`--tasks "
            "niah`) to fill this section."
        )

    images = []
    for (task,), same in group(rows, "task").items():
        for name in methods(same):
            own = [row for row in same if row["compression"] == name]
            title, label = f"{task}: {name}", f"needle_{task}_{name}"
            figure = needle_figure(own, title.replace("$", r"\$"))
            _keep(folder, label, figure)
            words = page.escape(needle_words(own, title))
            images.append(svg(figure, _plain(label), words))
    note = "<p class='note'>Score in percent; 0 is the start of the text.</p>"
    return note + page.plots(images, "needles")
