"""The decode step of a model on several chips that are not here: bytes, collectives.

Compiled by the chips' own compilers, in processes of their own; nothing is run. For
every chip and way to split, under every compression: bytes of weights and cache on one
chip against the whole over the number of chips, temporaries, and the collectives of a
step, those of a layer apart.
"""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

WAYS: dict[str, tuple[Callable[[int], int], bool]] = {
    "heads": (lambda chips: 1, False),
    "batch": (lambda chips: chips, False),
    "both": (lambda chips: 2, False),
    "slots": (lambda chips: 2, True),
}
"""Chips along the axis `data`, the others lie along `model`; and whether `data` splits
slots, not rows."""

KERNEL = r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*|[^"]*triton[^"]*)"'
MOVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """One program, in a process that holds the compiler."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    import kvjax
    from kvjax import axes
    from kvjax.cache import spread
    from kvjax.models import meshes, programs
    from kvjax.models.bundled import shape_of
    from kvjax.models.sharding import RULES, parameter_sharding
    from kvjax.pallas_kernels.targets import TARGETS
    from kvjax.types import nbytes

    (along_data, by_slots), chips = WAYS[request["ways"]], request["chips"]
    target, data = TARGETS[request["device"]], along_data(chips)
    devices = topologies.get_topology_desc(**target.of(chips)).devices
    # A chip of v7x is two devices, which share the rows or the slots of one.
    data *= len(devices) // chips
    grid = np.array(devices).reshape(data, -1)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = {**RULES, "shared_slots": "model"}  # of adakv_snapkv, which alone asks
    if by_slots:
        rules |= {"batch": None, "slots": "data"}
    where = meshes.Placement.of(mesh, rules)
    model = programs.abstract_model(shape_of(request["model"]), jnp.bfloat16)
    c = kvjax.compression(request["compression"])
    sizes = (request["batch"], request["context"] - request["room"])
    whole = NamedSharding(mesh, PartitionSpec())

    def lying(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with axes.split(where.mesh, where.rules):
        left = programs.left_by_prefill(model, *sizes, c, request["room"])
        program = programs.decode_program(model, *left, request["room"])
        graph, params, cache, front, *rest = program.args
        for path, leaf in nnx.to_flat_state(params):
            x, name = leaf.get_value(), ".".join(map(str, path))
            at = parameter_sharding(name, x.shape, mesh, rules)
            leaf.set_value(lying(x, at))
        groups = tuple(
            jax.tree.map(
                lambda x, at: lying(x, NamedSharding(mesh, at)),
                group,
                spread.specs_of(group, spread.axes_of(group)),
            )
            for group in cache.groups
        )
        rest = jax.tree.map(lambda x: lying(x, whole), rest)
        told = {"length": cache.length, "digest": cache.digest}
        told = {name: lying(x, whole) for name, x in told.items()}
        cache = dataclasses.replace(cache, groups=groups, **told)
        program = program._replace(args=(graph, params, cache, front, *rest))
        began = time.perf_counter()
        done = program.trace().lower().compile()
    memory = done.memory_analysis()
    text = done.as_text()
    found = {}
    for line in text.splitlines():
        hit = re.search(rf" = .*? ({MOVES})(?:-start)?\(.*channel_id=(\d+)", line)
        if hit and "/while/body" in line:  # one that goes on behind others: once
            found[hit[1], hit[2]] = "/while/body/while/body" in line
    layer = sorted(kind for (kind, _), inner in found.items() if inner)
    step = sorted(kind for (kind, _), inner in found.items() if not inner)
    return {
        "status": "ok",
        "weights_bytes": nbytes(params),
        "cache_bytes": nbytes(cache),
        "devices": mesh.size,
        "arguments_per_device_bytes": memory.argument_size_in_bytes,
        "temporaries_per_device_bytes": memory.temp_size_in_bytes,
        "cache_over_share": _held(groups) / (nbytes(groups) / mesh.size),
        "arguments_over_shards": memory.argument_size_in_bytes
        / _held(program.args[1:]),
        "collectives_per_layer": layer,
        "collectives_per_step_besides": step,
        "kernels": len(re.findall(KERNEL, text)),
        "compile_s": round(time.perf_counter() - began, 1),
    }


def _held(tree: Any) -> int:
    """Bytes of a tree on one device."""
    import jax
    import numpy as np

    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def asked(request: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own says of a program."""
    import os

    from kvjax.pallas_kernels.compilers import interpreter
    from kvjax.pallas_kernels.targets import TARGETS

    target = TARGETS[request["device"]]
    done = subprocess.run(
        [interpreter(target), __file__, "--one", json.dumps(request)],
        env={**os.environ, **target.environment},
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            return request | json.loads(line)
    last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    return request | {"status": "failed", "reason": last[0][:300]}


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        request = json.loads(sys.argv[2])
        try:
            found = compiled(request)
        except Exception as error:  # compilers raise whatever they like
            from kvjax.pallas_kernels.compilers import refusal

            status, reason, needs = refusal(error)
            found = {"status": status, "reason": reason, "needs_bytes": needs}
        print(json.dumps(found))
        return 0
    from common import arguments, report

    args = arguments(
        __doc__,
        name="mesh_decode",
        model="meta-llama/Llama-3.1-8B",
        context=131072,
        batch=8,
        room=64,
        chips=8,
        devices=["v5e", "v6e", "v7x"],
        ways=["heads", "both", "slots"],
        methods=["none", "adakv_snapkv", "kivi_4bit", "snapkv_kivi"],
    )
    rows = []
    for device in args.devices:
        for ways in args.ways:
            for name in args.methods:
                request = {
                    "device": device,
                    "chips": args.chips,
                    "ways": ways,
                    "compression": name,
                    "model": args.model,
                    "context": args.context,
                    "batch": args.batch,
                    "room": args.room,
                }
                if WAYS[ways][1] and name == "adakv_snapkv":
                    continue  # whose bodies are not split along slots
                rows.append(asked(request))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return report(args.name, vars(args), rows)


if __name__ == "__main__":
    sys.exit(main())
