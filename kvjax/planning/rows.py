"""A row of a plan: what one compression needs of one chip, and the most that fits."""

from collections.abc import Sequence

from kvjax.compress.config import Compression
from kvjax.planning.chips import Chip
from kvjax.planning.floors import prefill_flops
from kvjax.planning.planner import Planner
from kvjax.planning.record import Mark, Row
from kvjax.planning.search import MOST_ROWS, last_true, widths
from kvjax.planning.sizes import Held
from kvjax.planning.words import size

SHAPES: Mark = "shapes"
FORMULA: Mark = "formula"


def row_of(
    planner: Planner, label: str, c: Compression, context: int, batch: int, chip: Chip
) -> Row:
    """What a compression needs, by shapes and formulas, and how much of it fits.

    Args:
        planner: of the model.
        label: name of the compression.
        c: the compression.
        context: tokens of a row, prompt and answer.
        batch: rows.
        chip: the chip, or each of several.
    """
    needs = planner.needs(c, context, batch, chip.kind)
    held, memory = needs.held, chip.memory
    read = planner.read_weights + held.read
    tokens, rows = context - planner.new_tokens, -(-batch // planner.rows)
    flops = prefill_flops(planner.config, planner.kernels, c, rows, tokens)
    flops //= planner.ways
    contexts = widths(planner.config.max_positions, planner.new_tokens)
    place = _largest_context(planner, c, contexts, batch, chip, (context, held))
    largest = contexts[place] if place >= 0 else 0
    bound = "model" if place == len(contexts) - 1 else "memory"
    count, most = _largest_batch(planner, c, context, (batch, held), chip)
    marks: dict[str, Mark] = {name: SHAPES for name in _COUNTED}
    marks.update({name: FORMULA for name in _DERIVED})
    return Row(
        device=chip.name,
        compression=label,
        keep=c.keep,
        weights=needs.weights,
        codes=held.codes,
        scales=held.scales,
        positions=held.positions,
        tail=held.tail,
        statistics=held.statistics,
        host=held.host,
        decode_temporaries=needs.decode,
        prefill_temporaries=needs.prefill,
        peak=needs.peak,
        memory=memory,
        fits=needs.peak <= memory,
        upper=held.upper,
        read=read,
        ms_per_token=None if chip.bandwidth is None else 1e3 * read / chip.bandwidth,
        prefill_flops=flops,
        prefill_s=None if chip.flops is None else flops / chip.flops,
        largest_context=largest,
        context_bound=bound,
        largest_batch=count,
        batch_bound="search" if count == most else "memory",
        layers=held.layers if len(held.layers) > 1 else (),
        marks=marks,
        notes=_notes(c, held),
    )


_COUNTED = (
    "weights",
    "codes",
    "scales",
    "positions",
    "tail",
    "statistics",
    "host",
    "read",
)
_DERIVED = (
    "decode_temporaries",
    "prefill_temporaries",
    "peak",
    "ms_per_token",
    "prefill_flops",
    "prefill_s",
    "largest_context",
    "largest_batch",
)


def _notes(c: Compression, held: Held) -> tuple[str, ...]:
    notes = []
    if held.host:
        notes.append(
            f"{size(held.host)} of codes and scales lie in the host's memory; ms/token "
            "is without fetching them"
        )
    if held.upper:
        notes.append("ranks go with the data: its cache is at most this")
    if c.reads_less:
        notes.append("its budget is of what a step reads; held is all of it")
    if not c.prefill.causal:
        notes.append("a sparse prefill: its floor is without attention")
    return tuple(notes)


def _largest_context(
    planner: Planner,
    c: Compression,
    contexts: Sequence[int],
    batch: int,
    chip: Chip,
    known: tuple[int, Held],
) -> int:
    """Index of the largest of `contexts` that fits; `known` is one, and its cache."""
    context, held = known

    def expected(index: int) -> bool:
        how = (contexts[index], batch, chip.kind, held, contexts[index] / context)
        return planner.expected(c, *how) <= chip.memory

    def holds(index: int) -> bool:
        there = planner.needs(c, contexts[index], batch, chip.kind)
        return there.peak <= chip.memory

    count = len(contexts)
    return last_true(holds, count, last_true(expected, count, count // 2))


def _largest_batch(
    planner: Planner,
    c: Compression,
    context: int,
    known: tuple[int, Held],
    chip: Chip,
) -> tuple[int, int]:
    """The largest batch that fits, and the largest that is looked at."""
    batch, held = known
    count = max(1, min(MOST_ROWS, (2**31 - 1) // context) // planner.rows)

    def expected(index: int) -> bool:
        rows = (index + 1) * planner.rows
        how = (context, rows, chip.kind, held, rows / batch)
        return planner.expected(c, *how) <= chip.memory

    def holds(index: int) -> bool:
        rows = (index + 1) * planner.rows
        return planner.needs(c, context, rows, chip.kind).peak <= chip.memory

    place = last_true(holds, count, last_true(expected, count, count // 2))
    return (place + 1) * planner.rows, count * planner.rows
