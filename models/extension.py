"""A model with weights that it did not have before."""

from flax import nnx

from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder


def extended(model: Decoder, config: DecoderConfig, *, seed: int = 0) -> Decoder:
    """A decoder of `config` with all weights of `model`; what is new is fresh."""
    fresh = Decoder(config, dtype=model.dtype, rngs=nnx.Rngs(seed))
    graph, state = nnx.split(fresh)
    old = nnx.to_pure_dict(nnx.state(model))
    nnx.replace_by_pure_dict(state, _over(nnx.to_pure_dict(state), old))
    return nnx.merge(graph, state)


def _over(tree, other):
    """`tree` with every leaf that `other` has too."""
    if not isinstance(tree, dict):
        return other
    return {k: _over(v, other[k]) if k in other else v for k, v in tree.items()}
