"""One step: what it carries, what it is made of, and the two programs of a run."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kvjax.models.decoder import Decoder
from kvjax.narrow import narrow
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives.losses import next_token, token_scores
from kvjax.train.objectives.objective import Objective
from kvjax.train.objectives.passes import plain_states
from kvjax.train.run.mesh import everywhere, gathered, shardings
from kvjax.train.run.params import Params, leaves_of, with_params
from kvjax.types import pytree


@pytree
class TrainState:
    """What a run carries from step to step; `params` are the weights it trains."""

    step: jax.Array
    params: Params
    opt_state: Any


@narrow
def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """Step 0 of training `params`, over the devices of `mesh` if there is one."""

    def fresh(params: Params) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
        )

    if mesh is None:
        return fresh(params)
    where = shardings(jax.eval_shape(fresh, params), mesh)
    return jax.jit(fresh, out_shardings=where)(params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the weights of a run come from.

    Attributes:
        model: its structure, without weights.
        fixed: weights that are not trained.
        teacher: structure of the objective's teacher, or None.
        guide: those of its weights that are not in `fixed`, or not the same there.
        compute: dtype of the passes.
        mesh: devices that the run is spread over; None: one.
    """

    model: Decoder
    fixed: Params
    teacher: Decoder | None = None
    guide: Params = dataclasses.field(default_factory=dict)
    compute: str = "float32"
    mesh: Mesh | None = None

    @property
    def arrays(self) -> tuple[Params, Params]:
        """What a step needs beside its state."""
        return self.fixed, self.guide

    def joined(self, params: Params, fixed: Params) -> Decoder:
        """The model with trained and fixed weights."""
        return with_params(self.model, self._ready({**fixed, **params}))

    def guided(self, fixed: Params, guide: Params) -> Decoder | None:
        """The teacher, or None."""
        if self.teacher is None:
            return None
        held = {**fixed, **guide}
        own = {name: held[name] for name in leaves_of(self.teacher)}
        return with_params(self.teacher, self._ready(own))

    def _ready(self, params: Params) -> Params:
        cast = {name: x.astype(self.compute) for name, x in params.items()}
        return cast if self.mesh is None else gathered(cast, self.mesh)

    def traced(self) -> contextlib.AbstractContextManager[Any]:
        """What a pass is traced under: kernels see whether several devices run it."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


Step = Callable[[TrainState, TokenBatch, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    weights: Weights, objective: Objective, optimizer: optax.GradientTransformation
) -> Step:
    """`step(state, batch, weights.arrays) -> (state, metrics)`, the state donated.

    With a mesh the state stays where it is, and metrics are on every device.
    """

    def loss(params, batch, arrays):
        fixed, guide = arrays
        teacher = weights.guided(fixed, guide)
        return objective(weights.joined(params, fixed), batch, teacher)

    @narrow
    def step(state: TrainState, batch: TokenBatch, arrays: tuple[Params, Params]):
        grad = jax.value_and_grad(loss, has_aux=True)
        with weights.traced():
            (value, metrics), grads = grad(state.params, batch, arrays)
        # optax divides by its integer step count, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "norm": optax.tree.norm(grads), **metrics}
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        if weights.mesh is None:
            return state, metrics
        places = shardings(state, weights.mesh), everywhere(weights.mesh)
        return jax.lax.with_sharding_constraint((state, metrics), places)

    return jax.jit(step, donate_argnums=0)


def make_eval(
    weights: Weights, *, loop: bool = False
) -> Callable[[Params, TokenBatch], dict[str, jax.Array]]:
    """`evaluate(params, batch) -> metrics` with a full cache, jitted.

    `loop` compiles equal layers once.
    """
    where = None if weights.mesh is None else everywhere(weights.mesh)

    @functools.partial(jax.jit, out_shardings=where)
    @narrow
    def evaluate(params: Params, fixed: Params, batch: TokenBatch):
        with weights.traced():
            model = weights.joined(params, fixed)
            hidden = plain_states(model, batch.tokens, loop=loop)
            loss, metrics = next_token(token_scores(model, hidden, batch), batch)
        return {"loss": loss, **metrics}

    return lambda params, batch: evaluate(params, weights.fixed, batch)
