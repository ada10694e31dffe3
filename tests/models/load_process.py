"""Run by `test_placement.py`: loads checkpoints in a process of its own.

    python -m tests.models.load_process BIG SMALL

Prints one JSON object: host memory while BIG loads onto one device, and how SMALL
falls on a mesh of four.
"""

import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from kvjax import extend, prefill  # noqa: E402
from kvjax.models import Decoder, causal_attention, load, save  # noqa: E402
from kvjax.models.generation import generate_from  # noqa: E402
from kvjax.models.sharding import RULES  # noqa: E402
from kvjax.types import padded_positions  # noqa: E402


def status(name: str) -> int:
    """A size of this process in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def memory(big: str, small: str, dtype: str) -> dict[str, int]:
    load(small, dtype, tokenizer=False)  # imports and tracing are not the load's
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    model, _ = load(big, dtype, tokenizer=False)
    peak = status("VmHWM")
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))]
    return {"peak": peak - before, "model": sum(sizes), "largest": max(sizes)}


def logits(model: Decoder) -> np.ndarray:
    graphdef, params = nnx.split(model)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    positions = padded_positions(jnp.array([6, 4], jnp.int32), 6)

    def run(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, positions, causal_attention))

    return np.asarray(jax.jit(run)(params))


def meshes(small: str) -> dict[str, object]:
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    plain, _ = load(small, "float32", tokenizer=False)
    split, _ = load(small, "float32", tokenizer=False, mesh=mesh)
    kernel = split.layers.attention.q.kernel[...]
    save(split, pathlib.Path(small) / "again")
    again, _ = load(pathlib.Path(small) / "again", "float32", tokenizer=False)
    errors = []
    for rules in (RULES, dict(RULES, kv_heads=None)):
        wide = jax.make_mesh((4,), ("model",))
        try:
            load(small, tokenizer=False, mesh=wide, rules=rules)
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    return {
        "difference": float(np.abs(logits(plain) - logits(split)).max()),
        "again": float(np.abs(logits(plain) - logits(again)).max()),
        "shape": kernel.shape,
        "held": kernel.addressable_shards[0].data.shape,
        "errors": errors,
    }


def places(small: str) -> list[str]:
    """What is said of arrays that lie on other devices than the model or the cache."""
    one, two = jax.devices()[:2]
    model, _ = load(small, "float32", tokenizer=False)
    tokens = np.arange(6, dtype=np.int32)[None]
    logits, cache = prefill(model, jax.device_put(tokens, one), max_new_tokens=2)
    split, _ = load(
        small, "float32", tokenizer=False, mesh=jax.make_mesh((2,), ("model",))
    )
    there, elsewhere = jax.device_put((tokens, logits), two)
    said = []
    for call in (
        lambda: extend(model, cache, there[:, :1]),
        lambda: generate_from(model, cache, elsewhere, max_new_tokens=1),
        lambda: prefill(split, there),
        lambda: prefill(model, there, prefix=cache),
    ):
        try:
            call()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def main() -> None:
    big, small = sys.argv[1:]
    out = {dtype: memory(big, small, dtype) for dtype in ("float32", "bfloat16")}
    found = {"memory": out, "mesh": meshes(small), "places": places(small)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
