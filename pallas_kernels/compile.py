"""Compile every workload of every op for a chip that is not attached.

    python -m kvjax.pallas_kernels.compile --target v5e [--op column_stats] [--json]

The real compilers run: libtpu's for a TPU, XLA's and Mosaic's for a GPU; nothing is
executed. `make kernels` makes environments that hold them and runs this per target.
The variables that a compiler wants are set by starting a second process, since JAX has
read them by the time that this module runs.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels.cases import Workload
from kvjax.pallas_kernels.measured import (
    DUMP,
    emptied_dump,
    one_line,
    read_dump,
    vmem_bytes,
)
from kvjax.pallas_kernels.registry import OPS
from kvjax.pallas_kernels.targets import TARGETS, Target
from kvjax.pallas_kernels.traffic import implied_bytes


@dataclasses.dataclass(kw_only=True)
class Row:
    """What became of one program.

    Attributes:
        op: its name.
        workload: of the op's `WORKLOADS`.
        pass_: forward or backward.
        target: chip.
        backend: implementation; an op without one for this chip is compiled as `xla`.
        status: ok, refused (by the op), or failed (in a compiler).
        reason: of a refusal or a failure, one line.
        compile_s: seconds of lowering and compiling.
        onchip_bytes: VMEM of the largest kernel as libtpu allocated it, or dynamic
            shared memory per thread block.
        temp_bytes: HBM beside arguments and results.
        hbm_bytes: of XLA's cost analysis, which takes a kernel's own word for it;
            None for a program with loops.
        spec_bytes: that the kernels' block specs imply; see `traffic`.
        floor_bytes: that any implementation moves; with a gradient, in both passes.
        registers: per thread, GPU only.
        spill_bytes: stores of spilled registers, GPU only.
    """

    op: str
    workload: str
    pass_: str
    target: str
    backend: str
    status: str = "ok"
    reason: str = ""
    compile_s: float | None = None
    onchip_bytes: int | None = None
    temp_bytes: int | None = None
    hbm_bytes: int | None = None
    spec_bytes: int | None = None
    floor_bytes: int | None = None
    registers: int | None = None
    spill_bytes: int | None = None


def jobs(target: Target, only: str | None = None) -> Iterator[tuple[Row, Workload]]:
    """Every program to compile, in a fixed order."""
    for name, op in OPS.items():
        if only not in (None, name):
            continue
        backend = next(
            b for b in (target.backend, "xla", "reference") if b in op.backends
        )
        module = importlib.import_module(f"kvjax.pallas_kernels.{name}.cases")
        for load in module.WORKLOADS:
            for which in ("forward", "backward") if load.gradient else ("forward",):
                row = Row(
                    op=name,
                    workload=load.name,
                    pass_=which,
                    target=target.name,
                    backend=backend,
                )
                # With a gradient the floor is that of both passes together.
                if (which == "backward") == bool(load.gradient):
                    row.floor_bytes = load.floor_bytes
                yield row, load


def program(row: Row, load: Workload) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of arrays alone, and their shapes."""
    args, kwargs = load.make()
    call = getattr(importlib.import_module(f"kvjax.pallas_kernels.{row.op}"), row.op)
    is_array = {name: _holds_arrays(value) for name, value in kwargs.items()}
    traced = {n: v for n, v in kwargs.items() if is_array[n]}
    fixed = {n: v for n, v in kwargs.items() if not is_array[n]}

    def forward(args, traced):
        return call(*args, **traced, **fixed, backend=row.backend)

    if row.pass_ == "forward":
        return forward, (args, traced)

    def backward(args, traced, cotangents):
        def of(*moving):
            full = list(args)
            for index, one in zip(load.gradient, moving, strict=True):
                full[index] = one
            return forward(tuple(full), traced)

        _, pull = jax.vjp(of, *(args[index] for index in load.gradient))
        return pull(cotangents)

    return backward, (args, traced, jax.eval_shape(forward, args, traced))


def _holds_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "dtype") for leaf in leaves)


def topology_mesh(target: Target) -> jax.sharding.Mesh:
    """A mesh of one device of the chip."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(**target.topology)
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))


def compile_row(row: Row, load: Workload, mesh: jax.sharding.Mesh) -> Row:
    """The row, completed; whatever goes wrong is its status."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh), emptied_dump() as dump:
            function, shapes = program(row, load)
            structs = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape, jnp.dtype(x.dtype), sharding=sharding
                ),
                shapes,
            )
            traced = jax.jit(function).trace(*structs)
            compiled = traced.lower().compile()
            row.compile_s = round(time.perf_counter() - start, 2)
            dumped = read_dump(dump)
    except NotImplementedError as refusal:
        # JAX raises it, too, for what a lowering lacks; only the op's own word counts.
        own = str(refusal).startswith(row.op)
        row.status, row.reason = "refused" if own else "failed", one_line(refusal)
        return row
    except Exception as error:  # compilers raise whatever they like
        row.status, row.reason = "failed", one_line(error)
        return row
    return measure(row, traced, compiled, dumped)


def measure(row: Row, traced: Any, compiled: Any, dumped: dict[str, int]) -> Row:
    """Fill in what the compilers tell about a program."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    if memory is not None:
        row.temp_bytes = memory.temp_size_in_bytes
    text = compiled.as_text()
    # XLA for an absent GPU has no costs; everywhere it counts a loop's body once.
    if cost and "bytes accessed" in cost and " while(" not in text:
        row.hbm_bytes = int(cost["bytes accessed"])
    if row.backend == "tpu":
        row.onchip_bytes = vmem_bytes(text)
        row.spec_bytes = implied_bytes(traced.jaxpr)
    for name, value in dumped.items():
        setattr(row, name, value)
    return row


def versions() -> dict[str, str]:
    """Of what compiles."""
    import importlib.metadata as metadata

    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def started_anew(target: Target, argv: list[str]) -> int | None:
    """Exit code of a process with the target's environment; None inside of it."""
    if all(os.environ.get(k) == v for k, v in target.environment.items()):
        return None
    with tempfile.TemporaryDirectory() as dump:
        environment = {**os.environ, **target.environment}
        if target.family == "cuda":
            environment.setdefault(DUMP, dump)
        command = [sys.executable, "-m", "kvjax.pallas_kernels.compile", *argv]
        return subprocess.run(command, env=environment).returncode


def main(argv: list[str] | None = None) -> int:
    """Compile, print; 1 if a program failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m kvjax.pallas_kernels.compile")
    parser.add_argument("--target", required=True, choices=list(TARGETS))
    parser.add_argument("--op", choices=list(OPS))
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--first", type=int, default=0, help="skip programs before it")
    args = parser.parse_args(argv)
    target = TARGETS[args.target]
    code = started_anew(target, argv)
    if code is not None:
        return code
    mesh = topology_mesh(target)
    say(args.json, {"versions": versions(), "target": target.name})
    failed = False
    for number, (row, load) in enumerate(jobs(target, args.op)):
        if number < args.first:
            continue
        # Before it compiles: a compiler that ends the process is named by this line.
        say(args.json, {"starts": number, **dataclasses.asdict(row)})
        done = compile_row(row, load, mesh)
        say(args.json, dataclasses.asdict(done))
        failed |= done.status == "failed"
    say(args.json, {"done": True})  # a traceback, too, ends with exit code 1
    return int(failed)


def say(as_json: bool, record: dict[str, Any]) -> None:
    """Print a record for a program, or for a reader."""
    if as_json:
        print(json.dumps(record), flush=True)
    elif not {"starts", "done"} & set(record):
        known = [f"{k}={v}" for k, v in record.items() if v not in (None, "")]
        print(" ".join(known), flush=True)


if __name__ == "__main__":
    sys.exit(main())
