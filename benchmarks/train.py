"""A training step: plain, under simulated compression, and with transformers on torch.

The same weights, tokens and AdamW in all of them; one run. Two simulated steps: with an
eighth of each row behind its compression point, and ("most") with three quarters and a
gradient for the choice of tokens. Temporaries of the compiled step are measured at two
widths, with and without recomputed layers.
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
from kvjax.train.config import (
    DataConfig,
    OptimizerConfig,
    SamplingConfig,
    Source,
    Stage,
    TrainConfig,
)
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


def recipe(remat: bool, choice_gradient: float) -> TrainConfig:
    return TrainConfig(
        sampling=SamplingConfig(choice_gradient=choice_gradient),
        init=model_directory("kvjax-tiny"),
        data=DataConfig(sources=(Source(task="recall"),)),
        stages=(Stage(steps=100, lengths={1024: 1.0}),),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
        remat=remat,
    )


def a_batch(model: Decoder, rows: int, width: int, later: int) -> Batch:
    """Random tokens; the last `later` of a row lie behind its compression point."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, model.config.vocab_size, (rows, width), dtype=np.int32)
    return Batch(
        tokens=jnp.asarray(tokens),
        weights=jnp.ones((rows, width)),
        answers=jnp.zeros((rows, width), bool),
        prompt_lengths=jnp.full((rows,), width - later, jnp.int32),
        step=jnp.int32(0),
        later=later,
    )


class Steps:
    """A compiled step, run one at a time; an eighth of a row, or most, lies behind."""

    def __init__(
        self, c: Compression | None, rows: int, width: int, remat=False, most=False
    ):
        config = recipe(remat, choice_gradient=0.5 if most else 0.0)
        weights, params = weights_of(config)
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.state, self.arrays = init_state(params, optimizer), weights.arrays
        later = width * 3 // 4 if most else width // 8
        self.batch = a_batch(weights.model, rows, width, later)
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
    plain = Steps(None, *sizes)
    steps = (plain, Steps(c, *sizes), Steps(c, *sizes, most=True))
    for one in steps:
        one.run()
    for _ in range(args.repeats):  # in turns: a busy machine is busy for all
        for one in steps:
            one.times.append(one.run())
    ours, under, most = (statistics.median(one.times) for one in steps)
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
        "simulated_most_ms": most,
        "simulated_most_over_plain": most / ours,
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
