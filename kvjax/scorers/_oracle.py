"""Oracle: how much less likely the prompt becomes, told again without a token."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.scorers._replay import AbstractReplay


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(AbstractReplay):
    """The rise of the loss, to first order, when one head of a layer drops a token.

    The loss is the mean negative log-likelihood of the tokens that are told again. A
    score is minus its slope along a factor on the weight that the replay gives to the
    token, at 1: what dropping it would add were the loss linear down to 0. Negative
    ones say that the prompt is told better without.

    Cost: a pass over the prompt forward and two backward, in chunks, with attention
    over prompt and chunk. Memory is linear; layers are made again on the way back.
    Source: no paper has it in this form; the slope along a gate is how 1905.10650 rates
    whole heads, and the replays are those of KVzip (2505.23416). `kvjax.gate_slopes` is
    the same for a real continuation.
    Deviations: the first token of a replay that nothing leads in is told by the prompt
    itself, where no token is missing; it does not count.
    """

    def probe(self, again, tokens, lengths):
        whole = jnp.ones(again.shape, jnp.float32)

        def one(total: tuple[Array, Array], number: Array):
            told = self.retold(number, tokens, lengths)

            def loss(gates: Array) -> Array:
                logits = again(told.tokens, told.positions, gates=gates).logits
                return missed(logits, told.tokens, told.own)

            value, back = jax.vjp(loss, whole)
            (slope,) = back(jnp.ones_like(value))
            slopes, counts = total
            return (slopes + slope, counts + jnp.sum(told.own[:, 1:], axis=1)), None

        counts = jnp.zeros(lengths.shape, jnp.int32)
        zero = (jnp.zeros_like(whole), counts)
        (slopes, counts), _ = jax.lax.scan(one, zero, self.chunks(tokens.shape[1]))
        counts = jnp.maximum(counts, 1).astype(jnp.float32)
        return -slopes / counts[:, None, None]


def missed(
    logits: Float[Array, "B R V"], tokens: Int[Array, "B R"], which: Bool[Array, "B R"]
) -> Float[Array, ""]:
    """Negative log-likelihood of some tokens by the logits before them, summed."""
    logs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    found = jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(which[:, 1:], found, 0.0))
