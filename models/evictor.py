"""Giving a model a say on eviction: the step before it is trained to use it."""

import dataclasses

import jax.numpy as jnp

from kvjax.models.config import Evictor
from kvjax.models.decoder import Decoder
from kvjax.models.extension import extended

SILENCED = ("*.attention.q.kernel", "*.attention.q.bias")
"""Names of the weights that a `neuron` changes where it borrows one."""


def with_evictor(model: Decoder, evictor: Evictor, *, seed: int = 0) -> Decoder:
    """A model like `model` that speaks through `evictor`, and evicts nothing yet.

    A borrowed neuron starts at zero, so that its `offset` keeps every token; a head of
    its own starts from random weights (`seed`).

    Raises:
        ValueError: the model has an evictor of another kind.
    """
    config = model.config
    if config.evictor is not None:
        if config.evictor.kind == evictor.kind:
            return model
        raise ValueError(
            f"the model has an evictor of kind {config.evictor.kind!r}; got "
            f"{evictor.kind!r}. Start from a model without one."
        )
    config = dataclasses.replace(config, evictor=evictor)
    made = extended(model, config, seed=seed)
    if evictor.kind == "neuron":
        _silence(made.layers.attention, config.head_dim, config.num_heads)
    return made


def _silence(attention, head_dim: int, heads: int) -> None:
    """Zero the channels that a `neuron` borrows."""
    kv_heads = attention.k.kernel.shape[-1] // head_dim
    group = heads // kv_heads
    columns = jnp.arange(kv_heads) * group * head_dim + head_dim - 1
    for weight in (attention.q.kernel, attention.q.bias):
        if weight is not None:
            weight[...] = weight[...].at[..., columns].set(0)
