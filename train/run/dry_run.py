"""Compile the step of a recipe for chips that are not here, and say what it needs.

The compiler runs in a process of its own (`kvjax.pallas_kernels.compilers`): this
module as a program.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from kvjax.config import decode
from kvjax.narrow import narrow
from kvjax.pallas_kernels.compile import versions
from kvjax.pallas_kernels.compilers import answer, ask, needed, refusal, target_of
from kvjax.train.data.sampling import Sample, Sampler, check_choices
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import TrainConfig, as_tree
from kvjax.train.run.abstract import (
    abstract_batch,
    abstract_shape,
    abstract_state,
    hardest,
)
from kvjax.train.run.flops import matmul_flops
from kvjax.train.run.mesh import check_mesh, make_mesh
from kvjax.train.run.optimizer import make_optimizer
from kvjax.train.run.step import make_step


@dataclasses.dataclass(kw_only=True)
class CompiledStep:
    """One program of a recipe on one kind of chip; bytes are of one device.

    Attributes:
        compression: that the step trains under.
        width, rows: of its batch, over all devices.
        status: ok; too large, where the compiler found no way to fit; or failed.
        reason: of what is not ok, in the compiler's words.
        compile_s: seconds of lowering and compiling.
        arguments, outputs, temporaries: bytes; outputs that reuse their argument's
            memory (the donated state) do not count again in `total`.
        total: bytes that the step needs at once.
        hbm: bytes that there are.
        matmul_flops: of all devices, see `kvjax.train.run.flops`.
        counted_flops: of one device, by XLA, which counts the body of a loop once;
            None where it does not say.
    """

    compression: str
    width: int
    rows: int
    hbm: int
    status: str = "ok"
    reason: str = ""
    compile_s: float | None = None
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    total: int | None = None
    matmul_flops: int | None = None
    counted_flops: int | None = None


@narrow
def dry_run(
    config: TrainConfig,
    device: str,
    chips: int,
    told: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compile every step of a recipe, each compression at its hardest.

    Args:
        config: the recipe; of a model in `init` only the shape is looked at.
        device: name of a chip.
        chips: of the slice.
        told: of what is being compiled.

    Returns:
        `device`, `chips`, `versions` and `rows` (`CompiledStep`, as mappings).

    Raises:
        ValueError: unknown chip or slice, a mesh that does not fit it or the model, no
            compiler, or a compiler that ended without a word.
    """
    target = target_of(device)
    target.of(chips)
    check_choices(config)
    abstract_shape(config)
    request = {"device": device, "chips": chips, "recipe": as_tree(config)}
    result: dict[str, Any] = {"device": device, "chips": chips, "rows": []}
    ask("kvjax.train.run.dry_run", target, request, _listener(result, told))
    return result


def _listener(
    result: dict[str, Any], told: Callable[[str], None]
) -> Callable[[dict[str, Any]], None]:
    def heard(record: dict[str, Any]) -> None:
        if "starts" in record:
            told(record["starts"])
        elif "row" in record:
            result["rows"].append(record["row"])
        else:
            result.update(record)

    return heard


def _records(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from jax.experimental import topologies

    config = decode(_numbered(request["recipe"]), TrainConfig)
    target = target_of(request["device"])
    topology = topologies.get_topology_desc(**target.of(request["chips"]))
    shape, devices = abstract_shape(config), topology.devices
    check_mesh(config, shape, len(devices))
    if config.mesh.devices != len(devices):
        raise ValueError(
            f"`mesh` has {config.mesh.devices} devices, {request['chips']} chips of "
            f"{target.name} have {len(devices)}. Make them equal."
        )
    mesh = make_mesh(config.mesh, devices)
    yield {"versions": versions(), "devices": len(devices)}
    optimizer = make_optimizer(config.optimizer, config.steps)
    weights, state = abstract_state(config, shape, optimizer, mesh)
    stage = config.stages[-1]
    width = max(stage.lengths)
    batch = abstract_batch(stage.rows(width), width, mesh)
    for sample in _samples(config):
        name = sample.name if sample else "none"
        yield {"starts": f"{name}, {batch.tokens.shape[0]} rows of {width} tokens"}
        row = CompiledStep(
            compression=name,
            width=width,
            rows=batch.tokens.shape[0],
            hbm=target.hbm_bytes,
        )
        objective = make_objective(config, sample.compression if sample else None)
        step: Any = make_step(weights, objective, optimizer)
        with jax.set_mesh(mesh):
            compiled(row, step, (state, batch, weights.arrays))
        yield {"row": dataclasses.asdict(row)}


def _numbered(tree: dict[str, Any]) -> dict[str, Any]:
    """Row widths as numbers again, which JSON made text."""
    for stage in tree["stages"]:
        stage["lengths"] = {int(k): v for k, v in stage["lengths"].items()}
    return tree


def _samples(config: TrainConfig) -> list[Sample | None]:
    known = Sampler(hardest(config).sampling, config.seed).samples
    return [one for choice in known for one in choice] or [None]


def compiled(row: CompiledStep, step: Any, shapes: tuple[Any, ...]) -> None:
    """Fill in what the compiler says of a step; a failure is its status."""
    began = time.perf_counter()
    try:
        traced = step.trace(*shapes)
        row.matmul_flops = matmul_flops(traced.jaxpr.jaxpr)
        program = traced.lower().compile()
    except Exception as error:  # compilers raise whatever they like
        row.status, row.reason, row.total = refusal(error)
        return
    finally:
        row.compile_s = round(time.perf_counter() - began, 1)
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    row.arguments = memory.argument_size_in_bytes
    row.outputs = memory.output_size_in_bytes
    row.temporaries = memory.temp_size_in_bytes
    row.total = total = needed(memory)
    if total > row.hbm:
        row.status, row.reason = "too large", "more than the chip has"
    if cost.get("flops", 0) > 0:
        row.counted_flops = int(cost["flops"])


if __name__ == "__main__":
    sys.exit(answer(_records))
