"""Weights as a flat dict of dotted names, and which of them are trained."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array

from kvjax.messages import nearest
from kvjax.models.decoder import Decoder

Params = dict[str, Array]


def params_of(model: Decoder, dtype: Any = "float32") -> Params:
    """The weights of `model`, copied, by names such as `layers.mlp.up.kernel`."""
    return {name: jnp.array(x, dtype) for name, x in leaves_of(model).items()}


def leaves_of(model: Decoder) -> Params:
    """The weights of `model` themselves."""
    tree: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flat: Any = traverse_util.flatten_dict(tree)
    return {".".join(map(str, path)): leaf for path, leaf in flat.items()}


def with_params(model: Decoder, params: Mapping[str, Array]) -> Decoder:
    """A model like `model` with the weights of a flat dict."""
    graph, state = nnx.split(model)
    nested = traverse_util.unflatten_dict(
        {tuple(name.split(".")): x for name, x in params.items()}
    )
    nnx.replace_by_pure_dict(state, nested)
    return nnx.merge(graph, state)


def hollow(model: Decoder) -> Decoder:
    """A model like `model` that has shapes for weights, and keeps no array alive."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.eval_shape(lambda: state))


def split(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """What is trained and what stays: names that match a pattern, and the others.

    Args:
        params: all weights.
        patterns: shell patterns over names, `layers.attention.q.kernel`; none: all.

    Raises:
        ValueError: a pattern matches nothing.
    """
    if not patterns:
        return params, {}
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(params, pattern)
        if not found:
            raise ValueError(
                f"`trainable` has {pattern!r}, which matches no weight. A name is "
                f"{sorted(params)[-1]!r}.{nearest(pattern, params)}"
            )
        chosen.update(found)
    trained = {name: x for name, x in params.items() if name in chosen}
    return trained, {name: x for name, x in params.items() if name not in chosen}
