"""The loop: one jitted step, logs, checkpoints, a running evaluation."""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import optax

from kvjax.compress.config import Compression
from kvjax.interrupt import DEFAULTS, noted_interrupt
from kvjax.models.decoder import Decoder
from kvjax.narrow import narrow
from kvjax.train.data.batch import TokenBatch
from kvjax.train.data.sampling import Sampler
from kvjax.train.data.share import WHOLE
from kvjax.train.held_out.cached_loss import mean_loss
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import TrainConfig
from kvjax.train.run import processes
from kvjax.train.run.checkpoints import Checkpoints, restore
from kvjax.train.run.logs import Log, opened
from kvjax.train.run.mesh import share_of, spread
from kvjax.train.run.optimizer import make_optimizer
from kvjax.train.run.params import Params
from kvjax.train.run.progress import StartedStep, StepProgress, diverged
from kvjax.train.run.step import TrainState, Weights, init_state, make_eval, make_step
from kvjax.train.run.stored import not_finite, path_of

# A step donates its state: interrupted in the middle, there is none to save.
STOPPING = "stopping at the end of this step; once more to lose it"


@narrow
def train(
    weights: Weights,
    params: Params,
    config: TrainConfig,
    batches: Callable[[int, int], Iterator[TokenBatch]],
    *,
    directory: pathlib.Path,
    held_out: Callable[[int], dict[str, TokenBatch]] | None = None,
    cached: Callable[[Decoder, int], dict[str, dict[str, float]]] | None = None,
    progress: Callable[[StepProgress], None] | None = None,
) -> TrainState:
    """Train to the end, from the newest checkpoint of `directory` if there is one.

    Args:
        weights: the model, what is fixed of it, and the teacher.
        params: what is trained, as a fresh run starts.
        config: objective, sampled compressions, optimizer, when to log.
        batches: `(first, last) ->` the batches of those steps.
        directory: for `checkpoints/` and `log.jsonl`.
        held_out: batches to evaluate on at a step, by name.
        cached: accuracy and loss through the real cache at a step, by compression.
        progress: told of each step.

    Raises:
        ValueError: a damaged checkpoint; a step whose loss, gradient or weights are
            not finite: nothing of it is saved.
        OSError: a checkpoint cannot be written; those before it are kept.
        KeyboardInterrupt: at the end of the step in which SIGINT or SIGTERM came, whose
            state is saved.
    """
    optimizer = make_optimizer(config.optimizer, config.steps, config.bounds)
    fresh = init_state(params, optimizer, weights.mesh)
    state = restore(directory / "checkpoints", fresh, config.resume)
    first = int(state.step)
    if first > config.steps:
        raise ValueError(
            f"{directory} has done {first} steps; the recipe asks for {config.steps}. "
            "Give the last stage more of them, or another directory."
        )
    if first and processes.first():
        path = path_of(directory / "checkpoints", first)
        print(f"resuming from {path}: {first} of {config.steps} steps are done")
    with (
        opened(directory, config, first) as log,
        Checkpoints(directory / "checkpoints", config.keep) as checkpoints,
        noted_interrupt(*DEFAULTS, deferred=STOPPING) as interrupted,
    ):
        loop = _Loop(weights, config, optimizer, state, log, checkpoints)
        for number, batch in enumerate(batches(first, config.steps), first + 1):
            loop.advance(number, batch)
            if progress is not None:
                progress(StepProgress(step=number, steps=config.steps, loss=loop.loss))
            loop.log_step(number)
            metrics = loop.evaluate(number, held_out, cached)
            stop = loop.stops(number, interrupted)
            if stop or loop.is_due(number, metrics):
                loop.save(metrics)
            if stop:
                raise KeyboardInterrupt
    return loop.state


class _Loop:
    """What the parts of a step share."""

    def __init__(
        self,
        weights: Weights,
        config: TrainConfig,
        optimizer: optax.GradientTransformation,
        state: TrainState,
        log: Log,
        checkpoints: Checkpoints,
    ):
        self.weights, self.config, self.state = weights, config, state
        self.log, self.checkpoints = log, checkpoints
        self.sampler = Sampler(config.sampling, config.seed)
        self.held_out = make_eval(weights, loop=config.loop_layers)
        self.share = WHOLE if weights.mesh is None else share_of(weights.mesh)
        self.last: StartedStep | None = None
        self.loss: float | None = None
        self.began = self.logged_at = time.perf_counter()
        self.logged = int(state.step)

        @functools.cache  # one program per compression, and per width inside of it
        def compiled(c: Compression | None):
            return make_step(weights, make_objective(config, c), optimizer)

        self.compiled = compiled

    def advance(self, number: int, batch: TokenBatch) -> None:
        """One step; the one before it, which has finished by now, is checked."""
        sample = self.sampler.at(number - 1)
        step = self.compiled(sample.compression if sample else None)
        if self.weights.mesh is not None:
            batch = spread(batch, self.weights.mesh, self.share)
        self.state, metrics = step(self.state, batch, self.weights.arrays)
        before, self.last = (
            self.last,
            StartedStep(
                number=number,
                width=batch.tokens.shape[1],
                rows=batch.tokens.shape[0],
                compression=sample.name if sample else None,
                metrics=metrics,
            ),
        )
        if before is not None:
            self._check(before)

    def log_step(self, number: int) -> None:
        """Log a step that is to be logged."""
        if number % self.config.log_every or self.last is None:
            return
        self._check(self.last)
        started, now = self.last, time.perf_counter()
        self.log(
            step=number,
            width=started.width,
            **({"compression": started.compression} if started.compression else {}),
            **{k: float(v) for k, v in started.metrics.items()},
            seconds=round(now - self.began, 1),
            step_ms=round((now - self.logged_at) / (number - self.logged) * 1e3),
        )
        self.logged, self.logged_at = number, now

    def evaluate(self, number: int, held_out, cached) -> dict[str, float] | None:
        """Held-out metrics where they are due, averaged over sets and compressions."""
        if number % self.config.eval_every and number != self.config.steps:
            return None
        if self.last is not None:
            self._check(self.last)
        began, found = time.perf_counter(), []
        for name, batch in held_out(number).items() if held_out else ():
            if self.weights.mesh is not None:  # every process has all of it
                batch = spread(batch, self.weights.mesh)
            values = self.held_out(self.state.params, batch)
            found.append({k: float(v) for k, v in values.items()})
            self.log(step=number, held_out=name, **found[-1])
        through = {}
        if cached is not None:
            model = self.weights.joined(self.state.params, self.weights.fixed)
            with self.weights.traced():
                through = cached(model, number)
            for name, values in through.items():
                self.log(step=number, cached=name, **values)
        self.logged_at += time.perf_counter() - began  # steps are timed without it
        if not found:
            return None
        means = {k: sum(one[k] for one in found) / len(found) for k in found[0]}
        means |= mean_loss(through)
        return {"stage": self.config.stage_of(number), **means}

    def stops(self, number: int, interrupted: Callable[[], bool]) -> bool:
        """Whether to stop behind a step; several processes ask one another when due."""
        if number % self.config.log_every and jax.process_count() > 1:
            return False
        return processes.agreed(interrupted())

    def is_due(self, number: int, metrics: dict[str, float] | None) -> bool:
        """Whether a state is to be saved: by its number, or for being the best."""
        every = number % self.config.save_every == 0 or number == self.config.steps
        return every or self.checkpoints.improves(metrics)

    def save(self, metrics: dict[str, float] | None) -> None:
        """Save the state, unless anything of it is not finite."""
        assert self.last is not None
        self._check(self.last)
        if names := not_finite(self.state):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise self._diverged(self.last, f"{names[0]}{more} not finite")
        self.checkpoints.save(self.state, metrics)

    def _check(self, started: StartedStep) -> None:
        self.loss = started.loss
        if not (math.isfinite(self.loss) and math.isfinite(started.norm)):
            what = f"loss {self.loss}, gradient norm {started.norm}"
            raise self._diverged(started, what)

    def _diverged(self, started: StartedStep, what: str) -> ValueError:
        saved = self.checkpoints.last_saved
        return diverged(started, what, self.config.seed, saved)
