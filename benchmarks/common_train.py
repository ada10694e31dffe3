"""A compiled training step with random tokens, for the benchmarks of training."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.compress.config import Compression
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.bundled import model_directory
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import (
    DataConfig,
    OptimizerConfig,
    SamplingConfig,
    Source,
    Stage,
    TrainConfig,
)
from kvjax.train.run.model import weights_of
from kvjax.train.run.optimizer import make_optimizer
from kvjax.train.run.step import init_state, make_step

BOTH = {
    "evict.score.window": 16,
    "store.residual": 0,
    "store.keys.bits": 2,
    "store.values.bits": 2,
}


def recipe(
    remat: bool,
    choice_gradient: float,
    model: DecoderConfig | None = None,
    compute: str = "float32",
) -> TrainConfig:
    """AdamW on `kvjax-tiny`, or on a fresh `model`."""
    return TrainConfig(
        sampling=SamplingConfig(choice_gradient=choice_gradient),
        model=model,
        init="" if model else model_directory("kvjax-tiny"),
        compute=compute,
        data=DataConfig(sources=(Source(task="recall"),)),
        stages=(Stage(steps=100, lengths={1024: 1.0}),),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
        remat=remat,
    )


def a_batch(model: Decoder, rows: int, width: int, later: int) -> TokenBatch:
    """Random tokens; the last `later` of a row lie behind its compression point."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, model.config.vocab_size, (rows, width), dtype=np.int32)
    return TokenBatch(
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
        self,
        c: Compression | None,
        rows: int,
        width: int,
        remat=False,
        most=False,
        **how: Any,
    ):
        config = recipe(remat, choice_gradient=0.5 if most else 0.0, **how)
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
        """Megabytes that a step needs beside its arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 1e6
