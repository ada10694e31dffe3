"""What the compiler of a chip says of prefill and of decoding; nothing is executed.

For this machine's device it is JAX's own. A chip that is not here has its compiler in a
process of its own (`kvjax.pallas_kernels.compilers`): this module as a program.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.compress.config import Compression
from kvjax.compress.presets import COMPONENTS
from kvjax.config import decode, encode
from kvjax.models.config import DecoderConfig
from kvjax.models.programs import (
    Program,
    abstract_model,
    closing_program,
    decode_program,
    left_by_prefill,
    prefill_program,
)
from kvjax.pallas_kernels.compile import topology_mesh, versions
from kvjax.pallas_kernels.compilers import answer, ask, needed, refusal
from kvjax.pallas_kernels.targets import TARGETS
from kvjax.planning.chips import HERE, Chip
from kvjax.planning.planner import Planner
from kvjax.planning.record import Row
from kvjax.planning.rows import row_of
from kvjax.planning.words import size

PROGRAMS = ("prefill", "decode")
SEARCHED = ("largest_context", "context_bound", "largest_batch", "batch_bound")


def compiled(
    planner: Planner,
    chosen: Mapping[str, Compression],
    rows: Sequence[Row],
    chip: Chip,
    told: Callable[[str], None] = lambda _: None,
    *,
    context: int,
    batch: int,
) -> tuple[list[Row], dict[str, str]]:
    """Rows with what the chip's compiler says, and the versions of what said it.

    Args:
        planner: of the model.
        chosen: compressions by the names of `rows`.
        rows: by formula.
        chip: whose compiler is asked.
        told: of what is being compiled.
        context: of the plan.
        batch: of the plan.

    Raises:
        ValueError: no compiler for the chip, or one that ended without a word.
    """
    request = {
        "config": encode(planner.config),
        "dtype": planner.dtype.name,
        "device": chip.name,
        "batch": batch,
        "tokens": context - planner.new_tokens,
        "room": planner.new_tokens,
        "compressions": {n: encode(c, COMPONENTS) for n, c in chosen.items()},
    }
    records: list[dict[str, Any]] = []

    def heard(record: dict[str, Any]) -> None:
        if "starts" in record:
            told(f"{chip.name}: compiling {record['starts']}")
        records.append(record)

    if chip.name == HERE:
        for record in _records(request):
            heard(record)
    else:
        ask("kvjax.planning.compiling", TARGETS[chip.name], request, heard)
    said = {k: v for r in records for k, v in r.get("versions", {}).items()}
    by_name: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        if "program" in record:
            of = by_name.setdefault(record["name"], {})
            of.setdefault(record["program"], []).append(record)

    def made(row: Row) -> Row:
        new = _over(row, by_name.get(row.compression, {}))
        if new.fits == row.fits:
            return new
        # The formula is as far off around this context as it is there.
        memory = max(chip.memory - (new.peak - row.peak), 1)
        if not new.fits:  # whatever the compiler's reason was
            memory = min(memory, row.peak - 1)
        moved = dataclasses.replace(chip, memory=memory)
        c = chosen[row.compression]
        other = row_of(planner, row.compression, c, context, batch, moved)
        return dataclasses.replace(new, **{n: getattr(other, n) for n in SEARCHED})

    return [made(row) for row in rows], said


def _over(row: Row, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Row:
    """A row with what was compiled in place of formulas.

    Args:
        row: by formulas.
        found: what the compiler said of the programs of prefill, and of decoding.
    """
    fields: dict[str, Any] = {}
    marks, notes, peaks = dict(row.marks), [*row.notes], []
    held, fits = row.weights + row.cache, True
    for name in PROGRAMS:
        one = _worst(found.get(name, ()))
        fits &= one["status"] == "ok"
        if one["status"] == "too large" and one["total"]:
            notes.append(f"the compiler refuses {name}, for {size(one['total'])}")
        elif one["status"] != "ok":
            notes.append(f"{name} was not compiled, {one['status']}: {one['reason']}")
        if one["total"] is None:
            peaks.append(held + getattr(row, f"{name}_temporaries"))
            continue
        # All that the program has beside weights and cache, padding included.
        fields[f"{name}_temporaries"] = max(one["total"] - held, 0)
        marks[f"{name}_temporaries"] = "compiled"
        peaks.append(one["total"])
    whole = all(marks[f"{name}_temporaries"] == "compiled" for name in PROGRAMS)
    marks["peak"] = "compiled" if whole else "formula"
    fits &= max(peaks) <= row.memory
    how = {"peak": max(peaks), "fits": fits, "marks": marks, "notes": tuple(notes)}
    return dataclasses.replace(row, **fields, **how)


def _worst(said: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of programs that run one after the other: one that is refused, or the largest."""
    nothing = {"status": "failed", "reason": "it said nothing", "total": None}
    order = ("ok", "too large", "failed")

    def rank(one: Mapping[str, Any]) -> tuple[int, int]:
        return order.index(one["status"]), one["total"] or 0

    return max(said, key=rank, default=nothing)


def _records(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The versions, then a record per program."""
    config = decode(request["config"], DecoderConfig)
    model = abstract_model(config, jnp.dtype(request["dtype"]))
    sizes = (request["batch"], request["tokens"])
    mesh = None
    if request["device"] != HERE:
        mesh = topology_mesh(TARGETS[request["device"]])
    yield {"versions": versions()}
    for name, tree in request["compressions"].items():
        c = decode(tree, Compression, COMPONENTS)
        left = left_by_prefill(model, *sizes, c, request["room"])
        given = (model, *sizes, c, request["room"])
        programs = [("prefill", prefill_program(*given))]
        if c.schedule.chunk is not None:  # behind the chunks
            programs.append(("prefill", closing_program(*given)))
        programs.append(("decode", decode_program(model, *left, request["room"])))
        for kind, program in programs:
            yield {"starts": f"{kind} of {name}"}
            yield {"name": name, "program": kind, **_compiled(program, mesh)}


def _compiled(program: Program, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """What a compiler says of a program; a failure is its status."""
    began, where = time.perf_counter(), contextlib.nullcontext()
    if mesh is not None:
        spec = jax.sharding.PartitionSpec()
        program = program.placed(jax.sharding.NamedSharding(mesh, spec))
        where = jax.set_mesh(mesh)
    try:
        with where:
            memory = program.trace().lower().compile().memory_analysis()
    except Exception as error:  # compilers raise whatever they like
        status, reason, total = refusal(error)
        return {"status": status, "reason": reason, "total": total}
    took, total = round(time.perf_counter() - began, 1), needed(memory)
    return {"status": "ok", "reason": "", "total": total, "compile_s": took}


if __name__ == "__main__":
    sys.exit(answer(_records))
