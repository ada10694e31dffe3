"""Contract of scorers: how valuable is a token, per KV head?"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import AbstractTracker
from kvjax.types import LayerInputs, Lengths, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractScorer(abc.ABC):
    """Ranks the tokens of a prompt; a higher score is kept longer, `+inf` always.

    A scorer holds hyper-parameters only. It scores in two steps: `observe` looks at
    the pass once (whatever the budget), `rank` turns that into scores for a budget.
    What is beyond a row's length is ignored and may be anything.
    """

    needs_column_mass: ClassVar[bool] = False
    """Whether `observe` wants the attention mass of every key over all queries."""

    needs_retention: ClassVar[bool] = False
    """Whether the model must have an evictor (`LayerInputs.retention`)."""

    @property
    def protected(self) -> int:
        """Tokens that are kept whatever their score: budgets must not be below it."""
        return 0

    @abc.abstractmethod
    def observe(
        self,
        inputs: LayerInputs,
        lengths: Lengths,
        column_mass: Float[Array, "B H S"] | None,
    ) -> Any:
        """What the scores need of one layer's pass over the prompt.

        Args:
            inputs: queries, keys and values of the whole right-padded prompt.
            lengths: live tokens of each row.
            column_mass: softmax weight received per query head, summed over the
                queries; None unless `needs_column_mass`.

        Returns:
            A pytree whose leaves start with `[B, K, S]`.
        """

    def rank(self, observed: Any, counts: Int[Array, "B"], lengths: Lengths) -> Scores:
        """Scores, given that `counts [B]` tokens per head will be kept."""
        del counts, lengths
        return observed

    def tracker(self, interval: int) -> "AbstractScoreTracker":
        """The decode-time form, evicting every `interval` tokens.

        Raises:
            ValueError: this score cannot be kept up to date token by token.
        """
        del interval
        raise ValueError(
            f"{type(self).__name__} has no decode-time form. Use a scorer that has "
            "one (snapkv, h2o, tova, knorm, streaming_llm) or after_prefill."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractScoreTracker(AbstractTracker):
    """A tracker that starts from what it saw of the prompt."""

    def observe(self, inputs: LayerInputs, lengths: Lengths, observed: Any) -> Any:
        """What the state needs of the prompt, before slots are chosen.

        `observed` is what the scorer saw.
        """
        del inputs, lengths, observed
        return ()

    @abc.abstractmethod
    def start(self, observed: Any, index: Int[Array, "B K S"], tail: int) -> Any:
        """State for the chosen slots.

        Args:
            observed: what `observe` returned.
            index: prompt token in each body slot; free slots hold any index.
            tail: capacity of the tail.
        """


def last_queries(
    inputs: LayerInputs, lengths: Lengths, window: int
) -> tuple[Float[Array, "B H W D"], Int[Array, "B W"]]:
    """The last `window` queries of every row, oldest first, with their positions.

    Rows shorter than the window are padded in front with position -1.
    """
    positions = lengths[:, None] - window + jnp.arange(window)[None]
    index = jnp.maximum(positions, 0)[:, None, :, None]
    queries = jnp.take_along_axis(inputs.q, index, axis=2)
    return queries, jnp.where(positions >= 0, positions, -1)


def group_mean(
    x: Float[Array, "B H *rest"], kv_heads: int
) -> Float[Array, "B K *rest"]:
    """Mean over the query heads that share a KV head."""
    b, h, *rest = x.shape
    return jnp.mean(x.reshape(b, kv_heads, h // kv_heads, *rest), axis=2)


def protect_last(scores: Scores, lengths: Lengths, window: int) -> Scores:
    """`+inf` for the last `window` tokens of each row."""
    index = jnp.arange(scores.shape[-1])
    recent = index >= (lengths - window)[:, None, None]
    return jnp.where(recent, jnp.inf, scores)


def protect_first(scores: Scores, sinks: int) -> Scores:
    """`+inf` for the first `sinks` tokens."""
    return jnp.where(jnp.arange(scores.shape[-1]) < sinks, jnp.inf, scores)


def live_tokens(lengths: Lengths, tokens: int) -> Array:
    """`[B, 1, S]` mask of tokens below each row's length."""
    return (jnp.arange(tokens) < lengths[:, None])[:, None, :]


def to_kv_heads(x: Float[Array, "B S"], kv_heads: int) -> Scores:
    """The same scores for every KV head."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], kv_heads, x.shape[-1]))


def positive_int(name: str, value: int, least: int = 1) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}; got {value!r}.")


def row_keys(seed: int, layer: Int[Array, ""] | int, lengths: Lengths) -> Array:
    """One random key per row, a function of its length and not of its neighbours."""
    key = jax.random.fold_in(jax.random.key(seed), layer)
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(lengths)


def average_pool(x: Array, kernel: int) -> Array:
    """Centred moving average over the last axis, zeros outside and counted."""
    if kernel == 1:
        return x
    left = (kernel - 1) // 2
    pad = [(0, 0)] * (x.ndim - 1) + [(left, kernel - 1 - left)]
    padded, width = jnp.pad(x, pad), x.shape[-1]
    shifted = [padded[..., i : i + width] for i in range(kernel)]
    return jnp.asarray(sum(shifted)) / kernel
