"""A plan as a figure: bytes against context, the chip's memory as a line."""

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kvjax.eval.report.style import INK, SETTINGS, look, new_figure, spread
from kvjax.planning.planner import Planner
from kvjax.planning.record import Plan
from kvjax.planning.search import widths
from kvjax.planning.words import size

POINTS = 7
"""Contexts that are drawn: one an octave, the longest last."""


def figure(plan: Plan) -> Figure:
    """The peak of every compression at contexts up to the model's range.

    Raises:
        ValueError: a plan that was read from JSON, which holds no shapes.
    """
    if plan.planner is None:
        raise ValueError(
            "a plan that was read from JSON has no shapes to draw. Call `kvjax.plan` "
            "again."
        )
    made, colours = new_figure(7.2, 4.2), look([*plan.drawn])
    contexts = _contexts(plan.planner)
    kind, ends = plan.chips[0].kind, []
    with rc_context(SETTINGS):
        axes = made.subplots()
        for name, c in plan.drawn.items():
            needs = [plan.planner.needs(c, n, plan.batch, kind) for n in contexts]
            peaks = [one.peak / 1e9 for one in needs]
            colour, mark = colours[name]
            axes.plot(contexts, peaks, color=colour, marker=mark, label=name)
            keep = "" if c.keep is None else f" keep {c.keep:g}"
            ends.append((peaks[-1], f"{name}{keep}", colour))
        _finish(axes, plan, contexts, ends)
    return made


def _contexts(planner: Planner) -> list[int]:
    """About one an octave up to the model's range."""
    known = widths(planner.config.max_positions, planner.new_tokens)
    wanted = [planner.config.max_positions >> n for n in range(POINTS)]
    near = {min(known, key=lambda n: abs(n - one)) for one in wanted if one}
    return sorted(near)


def _finish(
    axes: Axes, plan: Plan, contexts: list[int], ends: list[tuple[float, str, str]]
) -> None:
    """Axes, the chips' memory, and the names of the lines at their ends."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"context in tokens (batch {plan.batch:,})")
    axes.set_ylabel(f"GB per chip at once ({plan.dtype})")
    axes.set_title(f"{plan.model}: what fits")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x):,}"))
    axes.set_xticks(contexts)
    axes.tick_params(axis="x", rotation=30)
    axes.minorticks_off()
    axes.set_xlim(contexts[0] / 1.25, contexts[-1] * 1.06)
    assert plan.planner is not None  # `figure` has looked
    weights = plan.planner.weights / 1e9
    axes.axhline(weights, color=INK, linewidth=0.8, linestyle=":")
    tallest = max([end for end, _, _ in ends])
    shown = [chip for chip in plan.chips if chip.memory / 1e9 <= 1.6 * tallest]
    for chip in shown:
        axes.axhline(chip.memory / 1e9, color=INK, linewidth=1.2, linestyle="--")
    top = max([tallest, *(chip.memory / 1e9 for chip in shown)]) * 1.06
    axes.set_ylim(0, top)
    first = contexts[0]
    axes.text(first, weights * 0.99, " weights", va="top", fontsize=8)
    for chip in shown:
        text = f" {chip.name}: {size(chip.memory)}"
        axes.text(first, chip.memory / 1e9, text, va="bottom", fontsize=8)
    heights = spread([end for end, _, _ in ends], top / 17, 0, top)
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        place = (contexts[-1] * 1.13, height)
        how = {"color": colour, "fontsize": 8.5, "va": "center"}
        axes.annotate(name, place, annotation_clip=False, **how)
