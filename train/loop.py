"""The loop: one jitted step, logs, checkpoints, a running evaluation."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from orbax.checkpoint import v1 as ocp

from kvjax.compress.config import Compression
from kvjax.models.decoder import Decoder
from kvjax.train.config import TrainConfig
from kvjax.train.objective import (
    Batch,
    Objective,
    make_objective,
    next_token,
    predictions,
)
from kvjax.train.optimizer import make_optimizer
from kvjax.train.params import Params, with_params
from kvjax.train.sampling import Sampler
from kvjax.types import pytree


@pytree
class TrainState:
    """What a run carries from step to step; `params` are the weights it trains."""

    step: jax.Array
    params: Params
    opt_state: Any


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 of training `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the weights of a run come from.

    Attributes:
        model: its structure; its own weights are those of step 0.
        fixed: weights that are not trained.
        teacher: structure of the objective's teacher, or None.
        guide: its weights.
        compute: dtype of the passes.
    """

    model: Decoder
    fixed: Params
    teacher: Decoder | None = None
    guide: Params = dataclasses.field(default_factory=dict)
    compute: str = "float32"

    @property
    def arrays(self) -> tuple[Params, Params]:
        """What a step needs beside its state."""
        return self.fixed, self.guide

    def joined(self, params: Params, fixed: Params) -> Decoder:
        """The model with trained and fixed weights."""
        return with_params(self.model, _cast({**fixed, **params}, self.compute))

    def guided(self, guide: Params) -> Decoder | None:
        """The teacher, or None."""
        if self.teacher is None:
            return None
        return with_params(self.teacher, _cast(guide, self.compute))


def _cast(params: Params, dtype: str) -> Params:
    return {name: x.astype(dtype) for name, x in params.items()}


def make_step(
    weights: Weights, objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch, weights.arrays) -> (state, metrics)`, the state donated."""

    def loss(params, batch, arrays):
        fixed, guide = arrays
        return objective(weights.joined(params, fixed), batch, weights.guided(guide))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, arrays: tuple[Params, Params]):
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = grad(state.params, batch, arrays)
        # optax divides by its integer step count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "norm": optax.tree.norm(grads), **metrics}
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    return step


def make_eval(
    weights: Weights,
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """`evaluate(params, batch) -> metrics` with a full cache, jitted."""

    @jax.jit
    def evaluate(params: Params, fixed: Params, batch: Batch):
        model = weights.joined(params, fixed)
        loss, metrics = next_token(predictions(model, batch), batch)
        return {"loss": loss, **metrics}

    return lambda params, batch: evaluate(params, weights.fixed, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """A JSON line per event in a file, and a short one on the terminal."""

    path: pathlib.Path

    def __call__(self, **event: Any) -> None:
        """Write one event."""
        event = {
            k: round(v, 5) if isinstance(v, float) else v for k, v in event.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        print("  ".join(f"{k} {v}" for k, v in event.items()), flush=True)


def save(directory: pathlib.Path, state: TrainState) -> None:
    """Write `directory/step_N`."""
    path = directory / f"step_{int(state.step)}"
    ocp.save(str(path.absolute()), _leaves(state), overwrite=True)


def restore(directory: pathlib.Path, state: TrainState) -> TrainState:
    """The newest checkpoint of `directory` in the shape of `state`, or `state`."""
    found = sorted(directory.glob("step_*"), key=lambda p: int(p.name.split("_")[1]))
    if not found:
        return state
    loaded = ocp.load(str(found[-1].absolute()), _leaves(state))
    leaves = [loaded[str(i)] for i in range(len(loaded))]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _leaves(state: TrainState) -> dict[str, jax.Array]:
    # Optimizer states are nested tuples and masks: numbered leaves survive any of it.
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def train(
    weights: Weights,
    params: Params,
    config: TrainConfig,
    batches: Callable[[int, int], Iterator[Batch]],
    *,
    directory: pathlib.Path,
    held_out: Callable[[int], dict[str, Batch]] | None = None,
) -> TrainState:
    """Train to the end, from the newest checkpoint of `directory` if there is one.

    Args:
        weights: the model, what is fixed of it, and the teacher.
        params: what is trained, as a fresh run starts.
        config: objective, sampled compressions, optimizer, when to log.
        batches: `(first, last) ->` the batches of those steps.
        directory: for checkpoints and `log.jsonl`.
        held_out: batches to evaluate on at a step, by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = Log(path=directory / "log.jsonl")
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = restore(directory, init_state(params, optimizer))
    evaluate = make_eval(weights)
    sampler = Sampler(config.sampling, config.seed)
    steps, log_every = config.steps, config.log_every

    @functools.cache  # one program per compression, and per width inside of it
    def compiled(c: Compression | None):
        return make_step(weights, make_objective(config, c), optimizer)

    began = last = time.perf_counter()
    first = int(state.step)
    for number, batch in enumerate(batches(first, steps), first + 1):
        sample = sampler.at(number - 1)
        step = compiled(sample.compression if sample else None)
        state, metrics = step(state, batch, weights.arrays)
        if number % log_every == 0 or number == first + 1:
            values = {k: float(v) for k, v in metrics.items()}
            now = time.perf_counter()
            done = log_every if number % log_every == 0 else 1
            log(
                step=number,
                width=batch.tokens.shape[1],
                **({"compression": sample.name} if sample else {}),
                **values,
                seconds=round(now - began, 1),
                step_ms=round((now - last) / done * 1e3),
            )
            last = now
        if held_out and (number % config.eval_every == 0 or number == steps):
            for name, one in held_out(number).items():
                values = {k: float(v) for k, v in evaluate(state.params, one).items()}
                log(step=number, held_out=name, **values)
            last = time.perf_counter()
        if number % config.save_every == 0 or number == steps:
            save(directory, state)
    return state
