"""Giving a model bases of its keys and values: the step before they are trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kvjax.attention import causal_attention
from kvjax.depth import in_order
from kvjax.models import checks
from kvjax.models.config import Projection
from kvjax.models.decoder import Attending, Decoder
from kvjax.models.extension import extended
from kvjax.types import LayerInputs, LengthsLike, TokensLike, padded_positions


def with_projection(
    model: Decoder,
    projection: Projection,
    tokens: TokensLike | None = None,
    lengths: LengthsLike | None = None,
) -> Decoder:
    """A model like `model` with a basis per layer and KV head; it computes the same.

    Args:
        model: a decoder.
        projection: which sides get one.
        tokens: `[B, T]` right-padded text, for the principal components of what the
            model makes of it; None: the channels as they are.
        lengths: `[B]` tokens per row; None: all of them.

    Raises:
        ValueError: the model has another projection; tokens that are no prompt.

    Source: MatryoshkaKV (2410.14731), initialisation by PCA. Deviation: second moments
    without their mean, since nothing adds it again; keys before RoPE.
    """
    config = model.config
    if config.projection is not None:
        if config.projection == projection:
            return model
        raise ValueError(
            f"the model has {config.projection}; got {projection}. Start from a model "
            "without one."
        )
    made = extended(model, dataclasses.replace(config, projection=projection))
    if tokens is None:
        return made
    graph, params = nnx.split(model)
    found = _components(graph, params, *checks.prompt(config, tokens, lengths))
    for side in projection.sides:
        basis = getattr(made.layers.attention, f"{side}_basis")
        basis[...] = found[side].astype(model.dtype)
    return made


@functools.partial(jax.jit, static_argnames=("graph",))
def _components(graph, params, tokens, lengths) -> dict[str, Array]:
    """Principal components of every layer's keys and values, `[L, K, D, D]`."""
    model = nnx.merge(graph, params)

    def look(inputs: LayerInputs, state: None):
        live = (inputs.positions >= 0)[:, None]
        plain = inputs.spec.rope.unrotate(
            inputs.k, jnp.maximum(inputs.positions, 0)[:, None]
        )
        found = {"key": _principal(plain, live), "value": _principal(inputs.v, live)}
        return causal_attention(inputs), state, found

    positions = padded_positions(lengths, tokens.shape[1])
    seen = model.run(tokens, positions, Attending(step=look))
    return in_order(seen.loops, seen.left)


def _principal(
    x: Float[Array, "B K T D"], live: Bool[Array, "B 1 T"]
) -> Float[Array, "K D D"]:
    """Eigenvectors of the second moments, the largest first, one per row."""
    x = jnp.where(live[..., None], x, 0).astype(jnp.float32)
    _, vectors = jnp.linalg.eigh(jnp.einsum("BKTC,BKTD->KCD", x, x))
    return vectors[..., ::-1].mT
