"""From logits to a token: greedy, temperature, top-k, top-p."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.fields import Amount, Checked, Fraction, Positive
from kvjax.types import NEG_INF

COLDEST = 1e-6
"""The lowest temperature by which logits are divided."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: only the `k` most likely tokens, or None.
        top_p: only the most likely tokens that together reach this probability (the
            one that crosses it included), or None.
    """

    temperature: Amount = 0.0
    top_k: Positive | None = None
    top_p: Fraction | None = None

    named: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.temperature < COLDEST:
            raise ValueError(
                f"`temperature` must be 0 or at least {COLDEST}, below which nothing "
                f"is left to draw; got {self.temperature}. Use 0."
            )

    @property
    def greedy(self) -> bool:
        """Whether no key is needed."""
        return self.temperature == 0.0

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, "B"]:
        """One token per row; the key is consumed."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            edge = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits >= edge, logits, NEG_INF)
        if self.top_p is not None and self.top_p < 1.0:
            logits = _nucleus(logits, self.top_p)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Logits of the tokens that together reach `top_p`; `-inf` for the others."""
    ordered = jnp.sort(logits, axis=-1)[..., ::-1]
    weight = jax.nn.softmax(ordered, axis=-1)
    inside = jnp.cumsum(weight, axis=-1) - weight < top_p
    # Whatever is asked: a denormal `top_p` is 0 on some devices.
    inside = inside.at[..., 0].set(True)
    edge = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= edge, logits, NEG_INF)
