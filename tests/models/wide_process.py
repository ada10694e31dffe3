"""Run by `test_wide.py`: every entry point in a process with 64-bit types on.

    python -m tests.models.wide_process DIRECTORY NAME...

NAME is a preset, or `train`, `eval` or `cli`. Prints one JSON object: what went wrong,
by name.
"""

import json
import os
import pathlib
import sys
from typing import Any

os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

import kvjax  # noqa: E402
from kvjax.cli.main import main as command  # noqa: E402
from kvjax.eval import harness  # noqa: E402
from kvjax.train.run.runner import run as train  # noqa: E402
from tests.eval import tiny  # noqa: E402
from tests.small import VOCAB, preset, small_model  # noqa: E402
from tests.train.mesh_run import SAMPLED  # noqa: E402
from tests.train.tiny_run import recipe  # noqa: E402

LENGTHS, WIDTH = np.array([60, 47]), 72
WIDE = {jnp.dtype("int64"), jnp.dtype("float64")}


def inference(name: str) -> None:
    """Everything that a cache goes through, of int64 tokens and lengths."""
    c, model = preset(name), small_model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, WIDTH)))
    assert tokens.dtype == jnp.int64
    logits, cache = kvjax.prefill(model, tokens, LENGTHS, c, max_new_tokens=24)
    later, cache = kvjax.extend(model, cache, tokens[:, :12], np.array([12, 7]))
    out = kvjax.generate(model, tokens, LENGTHS, c, max_new_tokens=10)
    graph, params = nnx.split(model)

    def loss(params):
        total = np.array([WIDTH, 55])
        found = kvjax.simulate(nnx.merge(graph, params), tokens, total, LENGTHS, c)
        return jnp.sum(found[:, :55] ** 2)

    slopes = jax.jit(jax.value_and_grad(loss))(params)
    narrow((logits, later, cache, tuple(out), slopes))


def narrow(tree: Any) -> None:
    """No leaf has 64 bits."""
    for at, x in jax.tree_util.tree_leaves_with_path(tree):
        assert x.dtype not in WIDE, (jax.tree_util.keystr(at), x.dtype)


def one(name: str, directory: pathlib.Path) -> None:
    """What a name stands for."""
    if name == "train":
        narrow(train(recipe(**SAMPLED), directory / name))
    elif name == "eval":
        harness.run(tiny.model(), tiny.tokenizer(), tiny.config(), directory / name)
    elif name == "cli":
        words = ["--prompt", "a = 1; a = ", "--max-new-tokens", "4", "--compression"]
        assert command(["generate", *words, "snapkv", "--keep", "1"]) == 0
    else:
        inference(name)


def main() -> None:
    directory, found = pathlib.Path(sys.argv[1]), {}
    assert jax.config.jax_enable_x64  # type: ignore[attr-defined]
    for name in sys.argv[2:]:
        try:
            one(name, directory)
        except Exception as wrong:
            found[name] = f"{type(wrong).__name__}: {wrong}"[:500]
        jax.clear_caches()  # maps of memory are few
    print(json.dumps(found))


if __name__ == "__main__":
    main()
