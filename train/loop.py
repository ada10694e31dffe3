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
from flax import nnx
from orbax.checkpoint import v1 as ocp

from kvjax.compress.config import Compression
from kvjax.models.decoder import Decoder
from kvjax.train.config import ObjectiveConfig, TrainConfig
from kvjax.train.objective import Batch, Objective, make_objective
from kvjax.train.sampling import Sampler
from kvjax.types import pytree


@pytree
class TrainState:
    """What a run carries from step to step; `params` is a plain nested dict."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_params(model: Decoder) -> Any:
    """The weights of `model` as a plain dict, copied, in float32."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


def init_state(model: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 from the weights of `model`, in float32."""
    params = init_params(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params)
    )


def with_params(model: Decoder, params: Any) -> Decoder:
    """A model like `model` with the weights of a plain dict."""
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def make_step(
    model: Decoder,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    teacher: Decoder | None = None,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch, guide) -> (state, metrics)`, jitted, the state donated.

    `guide` are the weights of `teacher`, or None without one.
    """

    def loss(params, batch, guide):
        guided = None if teacher is None else with_params(teacher, guide)
        return objective(with_params(model, params), batch, guided)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, guide: Any):
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = grad(state.params, batch, guide)
        # optax divides by its integer step count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "norm": optax.tree.norm(grads), **metrics}
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    return step


def make_eval(model: Decoder):
    """`evaluate(params, batch) -> metrics` with a full cache, jitted."""
    objective = make_objective(ObjectiveConfig())

    @jax.jit
    def evaluate(params, batch: Batch):
        value, metrics = objective(with_params(model, params), batch, None)
        return {"loss": value, **metrics}

    return evaluate


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
    model: Decoder,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    batches: Callable[[int, int], Iterator[Batch]],
    *,
    directory: pathlib.Path,
    teacher: Decoder | None = None,
    held_out: Callable[[int], dict[str, Batch]] | None = None,
) -> TrainState:
    """Train to the end, from the newest checkpoint of `directory` if there is one.

    Args:
        model: its weights are where a fresh run starts.
        config: objective, sampled compressions, number of steps, when to log.
        optimizer: an optax transformation.
        batches: `(first, last) ->` the batches of those steps.
        directory: for checkpoints and `log.jsonl`.
        teacher: what an objective that distills follows.
        held_out: batches to evaluate on at a step, by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = Log(path=directory / "log.jsonl")
    state = restore(directory, init_state(model, optimizer))
    guide = None if teacher is None else init_params(teacher)
    evaluate = make_eval(model)
    sampler = Sampler(config.sampling, config.seed)
    steps, log_every = config.steps, config.log_every

    @functools.cache  # one program per compression, and per width inside of it
    def compiled(c: Compression | None):
        objective = make_objective(config.objective, c, config.dms)
        return make_step(model, objective, optimizer, teacher)

    began = last = time.perf_counter()
    first = int(state.step)
    for number, batch in enumerate(batches(first, steps), first + 1):
        sample = sampler.at(number - 1)
        step = compiled(sample.compression if sample else None)
        state, metrics = step(state, batch, guide)
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
