"""Compile the step of a recipe for chips that are not here, and say what it needs.

The real compiler runs and nothing is executed. What it wants in its environment has to
be set before JAX is imported, and its wheels should not be where JAX is used otherwise:
so it runs in a process of its own, `python -m kvjax.train.run.dry_run`, which
`dry_run` feeds.
"""

import dataclasses
import importlib.resources
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from kvjax.config import decode
from kvjax.messages import nearest
from kvjax.narrow import narrow
from kvjax.pallas_kernels.compile import versions
from kvjax.pallas_kernels.measured import one_line
from kvjax.pallas_kernels.targets import TARGETS, Target
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

COMPILERS = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda13_plugin", "cuda13")}
"""By family: the module that holds the compiler, and the extra that installs it."""


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


def target_of(device: str) -> Target:
    """The chip of a name.

    Raises:
        ValueError: it is not known; the nearest is named.
    """
    if device not in TARGETS:
        raise ValueError(
            f"Unknown device {device!r}; expected one of {[*TARGETS]}."
            f"{nearest(device, TARGETS)}"
        )
    return TARGETS[device]


def interpreter(target: Target) -> str:
    """The Python that holds the compiler of a chip.

    `KVJAX_TPU_PYTHON` or `KVJAX_CUDA_PYTHON`, else this one.

    Raises:
        ValueError: this one has no such compiler; says which extra installs it.
    """
    module, extra = COMPILERS[target.family]
    variable = f"KVJAX_{target.family.upper()}_PYTHON"
    if given := os.environ.get(variable):
        return given
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"compiling for {target.name} needs {module}, which is not installed: "
            f"pip install 'kvjax[{extra}]', best into an environment of its own, and "
            f"name its Python in {variable}."
        )
    return sys.executable


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
    ask_compiler("kvjax.train.run.dry_run", target, request, _listener(result, told))
    return result


def ask_compiler(
    module: str,
    target: Target,
    request: dict[str, Any],
    heard: Callable[[dict[str, Any]], None],
) -> None:
    """A module run in a process that holds the compiler of a chip.

    Args:
        module: reads `request` as JSON, prints records, and ends with 0, or with 1
            behind a record `{"wrong": why}`.
        target: the chip.
        request: what it is asked.
        heard: called with each record.

    Raises:
        ValueError: no compiler, what the module calls wrong, or a process that ended
            without a word.
    """
    wrong: list[str] = []

    def listen(record: dict[str, Any]) -> None:
        wrong.extend([record["wrong"]] if "wrong" in record else [])
        heard(record)

    code, said = _run(interpreter(target), module, target, request, listen)
    if wrong:
        raise ValueError(wrong[0])
    if code:
        last = [line for line in said.splitlines() if line.strip()][-1:]
        raise ValueError(
            f"the process that compiles for {target.name} ended with code {code}: "
            f"{last[0] if last else 'it said nothing'}"
        )


def _run(
    python: str,
    module: str,
    target: Target,
    request: dict[str, Any],
    heard: Callable[[dict[str, Any]], None],
) -> tuple[int, str]:
    """Exit code of the process that compiles, and what it said beside its records."""
    command = [python, "-m", module]
    environment = {**os.environ, **target.environment, "PYTHONPATH": _path()}
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as said:
        json.dump(request, asked)
        asked.seek(0)
        with subprocess.Popen(
            command,
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # a compiler's own words
                heard(record)
        said.seek(0)
        return process.returncode, said.read()


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


def _path() -> str:
    """Where another interpreter finds this kvjax, and what this one was told."""
    own = os.path.dirname(str(importlib.resources.files("kvjax")))
    return os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))


def main() -> int:
    """Read a request from stdin, compile, print records; 1 for a wrong request."""
    request = json.load(sys.stdin)
    try:
        for record in _records(request):
            print(json.dumps(record), flush=True)
    except ValueError as wrong:
        print(json.dumps({"wrong": str(wrong)}), flush=True)
        return 1
    return 0


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
        full = re.search(r"RESOURCE_EXHAUSTED|Ran out of memory", str(error))
        row.status, row.reason = "too large" if full else "failed", one_line(error)
        row.total = used(str(error)) if full else None
        return
    finally:
        row.compile_s = round(time.perf_counter() - began, 1)
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    row.arguments = arguments = memory.argument_size_in_bytes
    row.outputs = outputs = memory.output_size_in_bytes
    row.temporaries = extra = memory.temp_size_in_bytes
    row.total = total = arguments + outputs - memory.alias_size_in_bytes + extra
    if total > row.hbm:
        row.status, row.reason = "too large", "more than the chip has"
    if cost.get("flops", 0) > 0:
        row.counted_flops = int(cost["flops"])


def used(said: str) -> int | None:
    """Bytes that a compiler would have needed, where it says so."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", said) or re.search(
        r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", said
    )
    return int(float(found[1]) * units[found[2]]) if found else None


if __name__ == "__main__":
    sys.exit(main())
