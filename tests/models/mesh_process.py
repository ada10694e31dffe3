"""Run by `test_mesh.py`: caches on meshes of virtual devices, or of two processes.

    python -m tests.models.mesh_process

A line of stdin is a case, `WHAT/COMPRESSION/MESH`; what it found is printed as a line
of JSON. MESH is `data,model`, perhaps with `,slots` for rules that split slots where
batches are split otherwise, or `,shared` for rules by which the heads of a device share
slots. `DEVICES` says how many devices this process has; with the variables of
`kvjax.train.run.processes` it is one of several.
"""

import importlib
import json
import os
import pathlib
import re
import sys
import tempfile
import traceback
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from kvjax.train.run.processes import VARIABLES, join  # noqa: E402

if __name__ == "__main__":  # before anything asks for devices
    jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
    if VARIABLES[0] in os.environ:
        join()

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

import kvjax  # noqa: E402
from kvjax import axes  # noqa: E402
from kvjax.eval import harness  # noqa: E402
from kvjax.models import generation, inference, meshes  # noqa: E402
from kvjax.models.generation import generate_from  # noqa: E402
from kvjax.models.sampling import Sampling  # noqa: E402
from kvjax.models.sharding import RULES, automatic  # noqa: E402
from kvjax.planning.planner import Planner  # noqa: E402
from kvjax.types import nbytes  # noqa: E402
from tests.eval import tiny  # noqa: E402
from tests.small import preset  # noqa: E402

ROWS, WIDTH, NEW = 4, 64, 12
LENGTHS = np.array([64, 50, 61, 33], np.int32)
MOVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
OTHER = {
    "slots": {**RULES, "batch": None, "slots": "data"},
    "shared": {**RULES, "shared_slots": "model"},
    "instead": {**RULES, "kv_heads": None, "slots": "model"},
}


def prompts(seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(1, tiny.CONFIG.vocab_size, (ROWS, WIDTH)).astype(np.int32)


def model_on(mesh: str) -> Any:
    """The tiny model on one device, or on a mesh."""
    if not mesh:
        return tiny.model(intermediate_size=32)
    data, heads, *other = mesh.split(",")
    shape = (int(data), int(heads))
    spread = jax.make_mesh(shape, ("data", "model"))
    return meshes.over(
        tiny.model(intermediate_size=32), spread, OTHER[other[0]] if other else RULES
    )


def generated(model: Any, c: Any) -> dict[str, Any]:
    """A generation of rows of several lengths."""
    made = kvjax.generate(model, prompts(), LENGTHS, c, max_new_tokens=NEW)
    return {"tokens": np.asarray(made.tokens).tolist()}


def lived(model: Any, c: Any) -> dict[str, Any]:
    """Behind a prefix, extended, and forked."""
    _, prefix = kvjax.prefill(model, prompts(1)[:1], max_new_tokens=0)
    logits, cache = kvjax.prefill(
        model, prompts(), LENGTHS, c, max_new_tokens=2 * NEW, prefix=prefix
    )
    made = generate_from(model, cache, logits, max_new_tokens=4)
    few = np.array([5, 3, 4, 1], np.int32)
    more, _ = kvjax.extend(model, cache, prompts(2)[:, :5], few)
    seen = np.arange(5)[None] < few[:, None]
    _, one = kvjax.prefill(model, prompts(3)[:1], None, c, max_new_tokens=2 * NEW)
    many = one.fork(ROWS, max_new_tokens=NEW)
    forked, _ = kvjax.extend(model, many, prompts(4)[:, :3])
    return {
        "tokens": np.asarray(made.tokens).tolist(),
        "extended": np.asarray(more)[seen].tolist(),
        "forked": np.asarray(forked).tolist(),
    }


def moved(model: Any, c: Any) -> dict[str, Any]:
    """Collectives of the loop that decodes, and how much of a cache a device has."""
    logits, cache = kvjax.prefill(model, prompts(), LENGTHS, c, max_new_tokens=NEW)
    graph, params = nnx.split(model)
    stops = jnp.full((4,), -1, jnp.int32)
    with meshes.on_mesh_of(model):
        start = (logits, cache.length, jax.random.key(0), stops, 0, Sampling(), NEW)
        state = generation._first(*start)
        own, front = inference.nameless(cache).apart
        given = (graph, params, own, front, state, jnp.int32(NEW), stops)
        lowered = generation._decode.lower(*given, sampling=Sampling())
    found = []
    for line in (lowered.compile().as_text() or "").splitlines():
        hit = re.search(rf"= (.*?) ({MOVES})(?:-start)?\(", line)
        if hit and "/while/body" in line:
            found.append([hit[2], hit[1], "/while/body/while/body" in line])
    bodies = [group.parts[0] for group in cache.groups]
    told = {"moves": found, "share": of_one(bodies) / nbytes(bodies)}
    where = model.placement
    if dict(where.rules) == dict(RULES):  # of which plans are
        planner = Planner(model.config, model.dtype, NEW, where.mesh.shape)
        planned = planner.held(c, WIDTH + NEW, ROWS).total
        told["planned"] = planned / of_one(cache)
    return told


def of_one(tree: Any) -> int:
    """Bytes that the first device has of a tree."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )


def saved(model: Any, c: Any) -> dict[str, Any]:
    """A cache that was saved from a mesh goes on there, and on one device."""
    logits, cache = kvjax.prefill(model, prompts(), LENGTHS, c, max_new_tokens=NEW)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(folder)
        out = []
        for other in (tiny.model(intermediate_size=32), model):
            again = kvjax.load_cache(folder, other)
            made = generate_from(
                other, again, jnp.array(np.array(logits)), max_new_tokens=NEW
            )
            out.append(np.asarray(made.tokens).tolist())
    return {"tokens": out}


def evaluated(model: Any, c: Any) -> dict[str, Any]:
    """Rows of an evaluation, times aside."""
    del c
    with tempfile.TemporaryDirectory() as folder:
        config = tiny.config(items=4, batch=4)
        rows = harness.run(model, tiny.tokenizer(), config, pathlib.Path(folder) / "r")
    names = ("compression", "keep", "task", "score", "nbytes", "predictions")
    return {"rows": [{name: row.get(name) for name in names} for row in rows]}


def refused(model: Any, c: Any) -> dict[str, Any]:
    try:
        kvjax.prefill(model, prompts(), LENGTHS, c)
    except ValueError as error:
        return {"said": str(error)}
    return {"said": ""}


def kernel(name: str, mesh: str) -> dict[str, Any]:
    """A Pallas kernel on every device, in its interpreter, against the reference."""
    case = importlib.import_module(f"kvjax.pallas_kernels.{name}.cases").CASES[0]
    call = getattr(importlib.import_module(f"kvjax.pallas_kernels.{name}"), name)
    args, fixed = case.make(np.random.default_rng(0))
    shape = tuple(map(int, mesh.split(",")))
    devices = automatic(jax.make_mesh(shape, ("data", "model")))
    everywhere = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
    where = meshes.Placement.of(devices)

    def run(*args: Any) -> Any:
        return call(*args, **fixed, backend="tpu", interpret=True)

    with axes.split(where.mesh, where.rules):
        found = jax.jit(run)(*jax.device_put(args, everywhere))
    wanted = call(*args, **fixed, backend="reference")
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return {
        "errors": [
            float(np.max(np.abs(np.float32(x) - np.float32(y)))) for x, y in pairs
        ],
        "specs": [str(x.sharding.spec) for x in jax.tree.leaves(found)],
    }


KINDS = {
    "generate": generated,
    "life": lived,
    "moves": moved,
    "save": saved,
    "eval": evaluated,
    "refused": refused,
}


def main() -> None:
    for case in map(str.strip, sys.stdin):
        kind, name, mesh = case.split("/")
        try:
            if kind == "kernel":
                found = kernel(name, mesh)
            else:
                found = KINDS[kind](model_on(mesh), preset(name))
        except Exception:  # of this case alone
            found = {"wrong": traceback.format_exc()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
