"""`kvjax.plan`: whether a model, a context and a batch fit, under which compression."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kvjax.compress.config import Compression
from kvjax.messages import shown
from kvjax.models import checks
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.narrow import narrow
from kvjax.planning.asked import compressions_of, mesh_of, model_of
from kvjax.planning.chips import Chip, chip_of
from kvjax.planning.fitting import mildest
from kvjax.planning.floors import prefill_flops
from kvjax.planning.planner import Needs, Planner
from kvjax.planning.record import Plan, Row
from kvjax.planning.search import MOST_ROWS, last_true, near, widths

DTYPES = ("bfloat16", "float16", "float32")

SHAPES, FORMULA = "shapes", "formula"


@narrow
def plan(
    model: Decoder | DecoderConfig | str,
    c: Compression | str | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    device: str | Sequence[str] = "here",
    new_tokens: int = 64,
    dtype: Any = None,
    memory: int | None = None,
    chips: int = 1,
    mesh: Mapping[str, int] | None = None,
    fit: bool = False,
    compile: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Plan:
    """What a model needs of a chip's memory, under each of some compressions.

    Weights and caches are those of the library's own programs, traced on shapes: nothing
    is loaded, allocated or run. Temporaries are estimates by formula, or with `compile`
    what the chip's own compiler says.

    Args:
        model: a decoder, its configuration, a directory, a GGUF file, or an id whose
            shape is known here.
        c: a compression, a preset's name, or several; None: one of each kind.
        context: tokens of a row, prompt and answer; None: the model's range.
        batch: rows.
        device: a chip, or several: names of `pallas_kernels.targets.TARGETS`, or `here`.
        new_tokens: of `context`, those that are generated.
        dtype: of the weights; None: a decoder's own, otherwise bfloat16.
        memory: bytes of each chip, where not all of its own may be used.
        chips: over which weights, heads and rows are split.
        mesh: how many ways, by axis: `data` (rows) and `model` (heads).
        fit: replace each budget by the mildest that fits, or the bits where there is no
            budget.
        compile: ask the chip's compiler; minutes, in a process of its own.
        told: of what is being done.

    Returns:
        A record with `headline`, `table()`, `plot()` and `as_tree()`.

    Raises:
        ValueError: what cannot be meant: says what was asked, what is possible, and what
            to change.

    Example:
        >>> found = plan("meta-llama/Llama-3.1-8B", "none", context=8192, device="v6e")
        >>> found.rows[0].cache / 8192 / 1024  # KiB per token
        128.5...
    """
    config, name = model_of(model)
    asked = compressions_of(c)
    checks.count("batch", batch, 1)
    checks.count("new_tokens", new_tokens, 1)
    context = _context(config, context, new_tokens)
    names = [device] if isinstance(device, str) else list(device)
    found = tuple(chip_of(one, memory) for one in dict.fromkeys(names))
    if not found:
        raise ValueError("`device` names no chip. Give one, or 'here'.")
    axes = mesh_of(chips, mesh, config)
    if compile and axes:
        raise ValueError(
            f"`compile` asks the compiler about one chip; got a mesh of {axes}. Leave "
            "one of them out."
        )
    kind = _dtype(dtype, model)
    planner = Planner(config, kind, new_tokens, axes)
    for label, one in asked.items():
        try:
            planner.check(one, context, batch)
        except ValueError as wrong:
            raise ValueError(f"{label}: {wrong}") from None
    rows, versions, drawn = [], {}, asked
    for chip in reversed(found):  # the first one's are drawn
        drawn = asked
        if fit:
            told(f"the mildest that fits {chip.name}")
            drawn = mildest(planner, asked, context, batch, chip)
        mine = []
        for label, one in drawn.items():
            told(f"{label} on {chip.name}")
            mine.append(_row(planner, label, one, context, batch, chip))
        if compile:
            from kvjax.planning.compiling import compiled

            sizes = {"context": context, "batch": batch}
            mine, said = compiled(planner, drawn, mine, chip, told, **sizes)
            versions |= said
        rows = [*mine, *rows]
    return Plan(
        model=name,
        context=context,
        batch=batch,
        new_tokens=new_tokens,
        dtype=kind.name,
        chips=found,
        mesh=axes,
        versions=versions,
        rows=tuple(rows),
        planner=planner,
        drawn=drawn,
    )


def _context(config: DecoderConfig, context: int | None, new_tokens: int) -> int:
    most = config.max_positions
    if context is None:
        context = most
    checks.count("context", context, 1)
    if context > most:
        raise ValueError(
            f"`context` is {context:,} tokens; the model's range is {most:,}. Give at "
            "most that, or a config with a RoPE scaling and a larger "
            "max_position_embeddings."
        )
    if context <= new_tokens:
        raise ValueError(
            f"`context` is prompt and answer together, and `new_tokens` of it are the "
            f"answer; got context={context} and new_tokens={new_tokens}, which leaves no "
            "prompt. Raise one or lower the other."
        )
    return context


def _dtype(dtype: Any, model: Any) -> jnp.dtype:
    if dtype is None:
        return model.dtype if isinstance(model, Decoder) else jnp.dtype("bfloat16")
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {list(DTYPES)}; got {shown(dtype)}.")
    return jnp.dtype(name)


def _row(
    planner: Planner, label: str, c: Compression, context: int, batch: int, chip: Chip
) -> Row:
    needs = planner.needs(c, context, batch, chip.kind)
    held, memory = needs.held, chip.memory
    read = planner.read_weights + held.read
    tokens, rows = context - planner.new_tokens, -(-batch // planner.rows)
    flops = prefill_flops(planner.config, planner.kernels, c, rows, tokens)
    flops //= planner.ways
    contexts = widths(planner.config.max_positions, planner.new_tokens)
    place = _largest_context(planner, c, contexts, batch, chip, (context, needs))
    largest = contexts[place] if place >= 0 else 0
    bound = "model" if place == len(contexts) - 1 else "memory"
    count, most = _largest_batch(planner, c, context, (batch, needs), chip)
    exact = FORMULA if planner.mesh else SHAPES
    marks = {name: exact for name in _COUNTED} | {name: FORMULA for name in _DERIVED}
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
        marks={**marks, "weights": SHAPES},
        notes=_notes(c, held.upper),
    )


_COUNTED = ("weights", "codes", "scales", "positions", "tail", "statistics", "read")
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


def _notes(c: Compression, upper: bool) -> tuple[str, ...]:
    notes = []
    if upper:
        notes.append("ranks go with the data: its cache is at most this")
    if not c.prefill.causal:
        notes.append("a sparse prefill: its floor is without attention")
    return tuple(notes)


def _largest_context(
    planner: Planner,
    c: Compression,
    contexts: Sequence[int],
    batch: int,
    chip: Chip,
    known: tuple[int, Needs],
) -> int:
    """Index of the largest of `contexts` that fits; `known` is one and its needs."""
    context, needs = known
    each = max(needs.peak - needs.weights, 1) / context
    guess = near(contexts, (chip.memory - needs.weights) / each)

    def holds(index: int) -> bool:
        there = planner.needs(c, contexts[index], batch, chip.kind)
        return there.peak <= chip.memory

    return last_true(holds, len(contexts), guess)


def _largest_batch(
    planner: Planner,
    c: Compression,
    context: int,
    known: tuple[int, Needs],
    chip: Chip,
) -> tuple[int, int]:
    """The largest batch that fits, and the largest that is looked at."""
    batch, needs = known
    units = max(1, min(MOST_ROWS, (2**31 - 1) // context) // planner.rows)
    each = max(needs.peak - needs.weights, 1) * planner.rows / batch

    def holds(index: int) -> bool:
        rows = (index + 1) * planner.rows
        return planner.needs(c, context, rows, chip.kind).peak <= chip.memory

    guess = int((chip.memory - needs.weights) / each) - 1
    most = units * planner.rows
    return (last_true(holds, units, guess) + 1) * planner.rows, most
