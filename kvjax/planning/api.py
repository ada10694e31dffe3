"""`kvjax.plan`: whether a model, a context and a batch fit, under which compression."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvjax.compress.config import Compression
from kvjax.messages import shown
from kvjax.models import checks
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.io import dtype_of
from kvjax.narrow import narrow
from kvjax.pallas_kernels.compilers import interpreter
from kvjax.pallas_kernels.targets import TARGETS
from kvjax.planning.asked import compressions_of, mesh_of, model_of
from kvjax.planning.chips import Chip, chip_of
from kvjax.planning.fitting import mildest
from kvjax.planning.planner import Planner
from kvjax.planning.record import Plan, Row
from kvjax.planning.rows import row_of


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

    Weights and caches are those of the library's own programs, traced on shapes:
    nothing is loaded, allocated or run. Temporaries are estimates by formula, or with
    `compile` what the chip's own compiler says.

    Args:
        model: a decoder, its configuration, a directory, a GGUF file, or an id whose
            shape is known here.
        c: a compression, a preset's name, or several; None: one of each kind.
        context: tokens of a row, prompt and answer; None: the model's range.
        batch: rows.
        device: a chip, or several: of `pallas_kernels.targets.TARGETS`, or `here`.
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
        ValueError: what cannot be meant: says what was asked, what is possible, and
            what to change.

    Example:
        >>> plan("meta-llama/Llama-3.1-8B", "none", context=8192, device="v6e").fits
        True
    """
    config, name = model_of(model)
    asked = compressions_of(c)
    checks.count("batch", batch, 1)
    checks.count("new_tokens", new_tokens, 1)
    context = _context(config, context, new_tokens)
    found = _chips(device, memory)
    checks.count("chips", chips, 1)
    axes = mesh_of(chips, mesh, config, batch)
    if compile and axes:
        raise ValueError(
            f"`compile` asks the compiler about one chip; got a mesh of {axes}. Leave "
            "one of them out."
        )
    if dtype is None:
        dtype = model.dtype if isinstance(model, Decoder) else "bfloat16"
    kind = dtype_of(dtype)
    planner = Planner(config, kind, new_tokens, axes)
    for label, one in asked.items():
        try:
            planner.check(one, context, batch)
        except ValueError as wrong:
            raise ValueError(f"{label}: {wrong}") from None
    for chip in found:
        if compile and chip.name in TARGETS:
            interpreter(TARGETS[chip.name])  # raise now what it would raise later
    rows: list[Row] = []
    versions: dict[str, str] = {}
    chosen: list[dict[str, Compression]] = []
    for chip in found:
        drawn = asked
        if fit:
            told(f"the mildest that fits {chip.name}")
            drawn = mildest(planner, asked, context, batch, chip)
        mine = []
        for label, one in drawn.items():
            told(f"{label} on {chip.name}")
            mine.append(row_of(planner, label, one, context, batch, chip))
        if compile:
            from kvjax.planning.compiling import compiled

            sizes = {"context": context, "batch": batch}
            mine, said = compiled(planner, drawn, mine, chip, told, **sizes)
            versions |= said
        rows += mine
        chosen.append(drawn)
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
        drawn=chosen[0],
    )


def _chips(device: str | Sequence[str], memory: int | None) -> tuple[Chip, ...]:
    names = [device] if isinstance(device, str) else device
    if not isinstance(names, Sequence):
        raise ValueError(
            f"`device` must be a chip's name or several; got {shown(device)}."
        )
    found = tuple(chip_of(one, memory) for one in dict.fromkeys(names))
    if not found:
        raise ValueError("`device` names no chip. Give one, or 'here'.")
    return found


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
            "`context` is prompt and answer, and `new_tokens` of it are the answer; "
            f"got context={context} and new_tokens={new_tokens}, which leaves no "
            "prompt. Raise one or lower the other."
        )
    return context
