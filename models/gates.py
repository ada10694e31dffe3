"""Telling a model which of its heads need the whole context."""

import dataclasses

import numpy as np
from flax import nnx
from jaxtyping import Float

from kvjax.models.config import read_gates
from kvjax.models.decoder import Decoder


def with_gates(model: Decoder, gates: Float[np.ndarray, "L K"]) -> Decoder:
    """A model with the same weights whose config has these `head_gates`.

    Args:
        model: a decoder; it stays as it is.
        gates: of every layer and KV head, in [0, 1].

    Raises:
        ValueError: gates of another shape, or out of range.
    """
    config = dataclasses.replace(model.config, head_gates=read_gates(gates))
    made = nnx.merge(*nnx.split(model))
    made.config = config
    return made
