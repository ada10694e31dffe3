"""Optimizers by name."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike
from optax import contrib

from kvjax.messages import nearest
from kvjax.train.recipe import OptimizerConfig

OPTIMIZERS = ("muon", "adamw")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warm-up, constant, decay to zero over the last `decay` steps."""
    rate = config.learning_rate
    parts = [
        optax.linear_schedule(rate / max(config.warmup, 1), rate, config.warmup),
        optax.constant_schedule(rate),
        _decay(config),
    ]
    ends = [config.warmup, max(config.warmup, steps - config.decay)]
    return optax.join_schedules(parts, ends)


def _decay(config: OptimizerConfig) -> optax.Schedule:
    steps = max(config.decay, 1)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, steps)
    return optax.linear_schedule(config.learning_rate, 0.0, steps)


def make_optimizer(
    config: OptimizerConfig, steps: int, bounds: tuple[float, float] | None = None
) -> optax.GradientTransformation:
    """The optimizer `config` names, with clipping and its schedule.

    `steps` are those of the run; with accumulation the schedule sees fewer updates.
    `bounds` are the least and the largest value that a weight may get.
    """
    by_step = schedule(config, steps)

    def rate(count: ArrayLike) -> ArrayLike:
        return by_step(jnp.asarray(count) * config.accumulate)

    if config.name == "muon":
        inner = contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    elif config.name == "adamw":
        inner = optax.adamw(
            rate, config.beta1, config.beta2, weight_decay=config.weight_decay
        )
    else:
        raise ValueError(
            f"Unknown optimizer {config.name!r}; expected one of {list(OPTIMIZERS)}."
            f"{nearest(config.name, OPTIMIZERS)}"
        )
    made = optax.chain(optax.clip_by_global_norm(config.clip), inner)
    if bounds is not None:
        made = optax.chain(made, _within(*bounds))
    if config.accumulate == 1:
        return made
    many = optax.MultiSteps(made, every_k_schedule=config.accumulate)
    return many.gradient_transformation()


def _within(low: float, high: float) -> optax.GradientTransformation:
    """Updates cut to what leaves every weight between `low` and `high`."""

    def cut(update: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.clip(weight + update, low, high) - weight

    return optax.stateless(lambda updates, params: jax.tree.map(cut, updates, params))


def _matrices(params):
    # Embedding rows are looked up, not multiplied: they stay with AdamW. Matrices of
    # layers are stacked, each is one.
    def numbers(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        first = int("layers" in name.split("."))
        if name.endswith("embedding") or leaf.ndim != first + 2:
            return None
        return contrib.MuonDimensionNumbers(first, first + 1)

    return jax.tree_util.tree_map_with_path(numbers, params)
