"""A training step: plain, under simulated compression, and with transformers on torch.

The same weights, tokens and AdamW in all of them; one run. Temporaries of the compiled
step are measured at two widths, with and without recomputed layers.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, arguments, report

import kvjax
from kvjax.compress.config import Compression
from kvjax.models import Decoder
from kvjax.models.bundled import model_directory
from kvjax.train.config import DataConfig, OptimizerConfig, Source, Stage, TrainConfig
from kvjax.train.loop import init_state, make_step
from kvjax.train.objective import Batch, make_objective
from kvjax.train.optimizer import make_optimizer
from kvjax.train.run import weights_of

BOTH = {
    "evict.score.window": 16,
    "store.residual": 0,
    "store.keys.bits": 2,
    "store.values.bits": 2,
}


def recipe(remat: bool) -> TrainConfig:
    return TrainConfig(
        init=model_directory("kvjax-tiny"),
        data=DataConfig(sources=(Source(task="recall"),)),
        stages=(Stage(steps=100, lengths={1024: 1.0}),),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
        remat=remat,
    )


def a_batch(model: Decoder, rows: int, width: int) -> Batch:
    """Random tokens; the last eighth of a row lies behind its compression point."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, model.config.vocab_size, (rows, width), dtype=np.int32)
    return Batch(
        tokens=jnp.asarray(tokens),
        weights=jnp.ones((rows, width)),
        answers=jnp.zeros((rows, width), bool),
        prompt_lengths=jnp.full((rows,), width - width // 8, jnp.int32),
        step=jnp.int32(0),
        later=width // 8,
    )


class Steps:
    """A compiled step, run one at a time."""

    def __init__(self, c: Compression | None, rows: int, width: int, remat=False):
        config = recipe(remat)
        weights, params = weights_of(config)
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.state, self.arrays = init_state(params, optimizer), weights.arrays
        self.batch = a_batch(weights.model, rows, width)
        step = make_step(weights, make_objective(config, c), optimizer)
        self.compiled = step.lower(self.state, self.batch, self.arrays).compile()  # type: ignore
        self.times: list[float] = []

    def run(self) -> float:
        """Milliseconds of one step."""
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.batch, self.arrays)
        jax.block_until_ready(metrics)
        return 1e3 * (time.perf_counter() - start)

    @property
    def temp_mb(self) -> float:
        return self.compiled.memory_analysis().temp_size_in_bytes / 1e6


def torch_side(tokens: np.ndarray, repeats: int) -> dict:
    python = os.environ.get("KVJAX_TORCH_PYTHON") or sys.executable
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        model, _ = kvjax.load(model_directory("kvjax-tiny"), dtype="float32")
        kvjax.save(model, path)
        np.save(path / "tokens.npy", tokens)
        script, given = HERE / "torch_train.py", (path, path / "tokens.npy", repeats)
        command = [python, *map(str, (script, *given))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    args = arguments(__doc__, name="train", width=1024, rows=4, repeats=7)
    c = kvjax.compression("snapkv_kivi", **BOTH)
    sizes = (args.rows, args.width)
    plain, simulated = Steps(None, *sizes), Steps(c, *sizes)
    plain.run()
    simulated.run()
    for _ in range(args.repeats):  # in turns: a busy machine is busy for both
        plain.times.append(plain.run())
        simulated.times.append(simulated.run())
    ours, under = (statistics.median(x.times) for x in (plain, simulated))
    theirs = torch_side(np.asarray(plain.batch.tokens), args.repeats)
    temps = {
        f"{name}{'-remat' if remat else ''}@{width}": Steps(
            how, args.rows, width, remat
        ).temp_mb
        for name, how in (("plain", None), ("simulated", c))
        for remat in (False, True)
        for width in (args.width, 2 * args.width)
    }
    tokens = args.rows * args.width
    results = {
        "plain_ms": ours,
        "simulated_ms": under,
        "simulated_over_plain": under / ours,
        "tokens_s": 1e3 * tokens / ours,
        "torch": theirs,
        "torch_over_plain": theirs.get("step_ms", float("nan")) / ours,
        "temp_mb": temps,
    }
    if "error" in theirs:
        results["torch_over_plain"] = None
    return report(args.name, vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
