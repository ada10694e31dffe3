"""DuoAttention: which heads need the whole context, learnt by doing without it.

Every KV head mixes full attention with what a streaming head sees; its gate is the
share of the first. Gates alone are trained, to be low where the last hidden states stay
those of full attention. A finished model has them in its config, as `head_gates`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from kvjax.attention import causal_attention, self_attention
from kvjax.models.config import read_gates
from kvjax.models.decoder import Attention, Decoder
from kvjax.train.recipe import DuoConfig
from kvjax.types import LayerInputs

PATTERNS = ("gates",)
"""Names of what is trained, for `params.split`."""

DIGITS = 6
"""Decimals of a gate in a finished model's config."""


class GatedDecoder(Decoder):
    """A decoder with the weights of `base` and a gate per layer and KV head.

    Gates start where those of `base` are, at 1 where it has none.
    """

    def __init__(self, base: Decoder):
        config = base.config
        start = np.ones((config.num_layers, config.num_kv_heads))
        gates = config.head_gates or read_gates(start)
        self.config = dataclasses.replace(config, head_gates=gates)
        self.embedding, self.layers = base.embedding, base.layers
        self.norm, self.head = base.norm, base.head
        self.gates = nnx.Param(jnp.asarray(gates, jnp.float32))


def gates_of(model: Decoder) -> Float[Array, "L K"]:
    """The gates of a model in training, float32."""
    assert isinstance(model, GatedDecoder)
    return model.gates[...].astype(jnp.float32)


def exported(model: Decoder) -> Decoder:
    """A plain decoder whose config holds the gates; another model as it is."""
    if not isinstance(model, GatedDecoder):
        return model
    gates = np.clip(np.asarray(gates_of(model), np.float64), 0.0, 1.0)
    gates = read_gates(gates.round(DIGITS))
    config = dataclasses.replace(model.config, head_gates=gates)
    plain = nnx.eval_shape(lambda: Decoder(config, dtype=model.dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(plain)
    held = nnx.to_pure_dict(nnx.state(model))
    nnx.replace_by_pure_dict(state, {k: x for k, x in held.items() if k != "gates"})
    return nnx.merge(graph, state)


def mixed(config: DuoConfig, gates: Float[Array, "L K"]) -> Attention:
    """`gate * full + (1 - gate) * streaming` attention in every layer.

    Source: DuoAttention (2410.10819) section 2.2.
    """

    def allowed(q_positions: Array, k_positions: Array) -> Bool[Array, "B 1 t s"]:
        distance = q_positions[:, :, None] - k_positions[:, None, :]
        sink = k_positions[:, None, :] < config.sink
        return (sink | (distance < config.recent))[:, None]

    def attention(inputs: LayerInputs) -> Float[Array, "B H T D"]:
        spec = inputs.spec
        gate = jnp.repeat(gates[inputs.depth.layer], spec.groups)[None, :, None, None]
        streaming, _ = self_attention(inputs, allowed=allowed)
        return gate * causal_attention(inputs) + (1.0 - gate) * streaming

    return attention


def terms(
    config: DuoConfig,
    gates: Float[Array, "L K"],
    states: Float[Array, "B T E"],
    full: Float[Array, "B T E"],
    answers: Bool[Array, "B T"],
) -> dict[str, tuple[float, Float[Array, ""]]]:
    """Weights and values of the two terms of the loss.

    `distance` is the mean square between the last hidden states under `mixed` and under
    full attention, where the next token is one of an answer; `gates` their mean.

    Source: DuoAttention section 2.2 and its train.py (mean over channels and answer
    tokens). Deviations: the states that predict the answers, not those at them.
    """
    square = jnp.square(states.astype(jnp.float32) - full.astype(jnp.float32))
    counted = answers[:, 1:]
    each = jnp.where(counted, jnp.mean(square, axis=-1)[:, :-1], 0.0)
    count = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
    penalty = jnp.mean(jnp.abs(gates))
    return {"distance": (1.0, jnp.sum(each) / count), "gates": (config.weight, penalty)}
