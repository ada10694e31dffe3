"""The decoder: one NNX module for every family; attention is the caller's.

The weights of all layers are stacked, and `Decoder.run` loops over them: it hands each
layer's rotated queries and keys to attention, so a dense pass, a prefill that fills a
cache, a decode step that reads one, and training's parallel form are the same model
under another attention.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax import axes
from kvjax.depth import Depth, Loop, grouped, members, over
from kvjax.models.blocks import Layer, Linear, norm_of, product
from kvjax.models.config import DecoderConfig
from kvjax.models.meshes import Placement
from kvjax.types import LayerInputs, loops_of

Attention = Callable[[LayerInputs], Array]
"""Attention that remembers nothing, `LayerInputs -> [B H T D]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attending:
    """Attention that hands something on from layer to layer, or leaves something.

    Attributes:
        step: `(inputs, state) -> (out, state, left)`; `out` is `[B H T D]`. With
            `past` it is given what the layer has of it as a third argument.
        state: of the first layer.
        kinds: of every layer, where attention does not do the same in all that the
            model itself has alike (`LayerInputs.depth.kind`); empty otherwise.
        loops: over the layers, where they are settled already; empty: by their kinds.
        past: for every group of `loops` what its layers have of earlier tokens, stacked
            along a first axis; empty: nothing.
    """

    step: Callable[..., tuple[Array, Any, Any]]
    state: Any = None
    kinds: tuple[Hashable, ...] = ()
    loops: tuple[Loop, ...] = ()
    past: tuple[Any, ...] = ()


def attending(attention: Attention | Attending) -> Attending:
    """Attention that remembers nothing in the form that may."""
    if isinstance(attention, Attending):
        return attention
    return Attending(step=lambda inputs, state: (attention(inputs), state, ()))


def along_rows(x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """A residual stream split along its rows, if the trace is for a mesh."""
    return axes.laid_out(x, ("batch", None, None))


class Pass(NamedTuple):
    """What a pass over some tokens gives.

    Attributes:
        hidden: hidden states after the final norm.
        state: what attention handed on behind the last layer.
        left: what it left in each layer, stacked, for every group of `loops`.
        streams: the residual stream behind each layer, likewise, where asked for.
        loops: which layers are together.
    """

    hidden: Float[Array, "B T E"]
    state: Any
    left: tuple[Any, ...]
    streams: tuple[Any, ...]
    loops: tuple[Loop, ...]


class Decoder(nnx.Module):
    """A causal language model without an opinion on attention.

    `layers` is one `Layer` whose weights have a leading axis for the layers.
    `placement` is what it was spread over when it was loaded, or None.

    Args:
        config: static; `config.layers` says what each layer's attention is.
        dtype: of the parameters and of the matrix products.
        rngs: fresh weights; stream `params`.
    """

    def __init__(self, config: DecoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.placement: Placement | None = None
        shape = (config.vocab_size, config.hidden_size)
        noise = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param((noise * config.init_std).astype(dtype))
        self.layers = _stacked(
            [Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = norm_of(config, config.hidden_size, dtype)
        self.head = None if config.tie_embeddings else _head(config, dtype, rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the parameters, and of keys and values."""
        return self.embedding[...].dtype

    def layer(self, index: int) -> Layer:
        """A copy of one layer."""
        graph, weights = nnx.split(self.layers)
        return nnx.merge(graph, jax.tree.map(lambda x: x[index], weights))

    def embed(self, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape E"]:
        """Scaled embeddings; ids out of range read the nearest valid row."""
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attention: Attention | Attending,
        **how: Any,
    ) -> Float[Array, "B T E"]:
        """Hidden states after the final norm; arguments as of `run`."""
        return self.run(tokens, positions, attention, **how).hidden

    def run(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attention: Attention | Attending,
        *,
        trained: bool = False,
        remat: bool = False,
        unroll: bool = False,
        streams: bool = False,
        place: Callable[[Array], Array] = along_rows,
    ) -> Pass:
        """A pass over tokens, with all that it leaves.

        Args:
            tokens: right-padded token ids.
            positions: absolute positions, `EMPTY` at padding.
            attention: called once per kind of layer, or layer by layer with `unroll`.
            trained: whether there may be a backward pass: loops are then given their
                weights, which costs a copy where one loop is not the whole model.
            remat: recompute each layer in the backward pass instead of storing it.
            unroll: compile layer by layer: programs grow with depth.
            streams: keep the residual stream behind every layer.
            place: where the residual stream is to be, over several devices; called
                with it in front of every layer. By default its rows are split as the
                rules of the trace say.
        """
        asked = attending(attention)
        specs, kinds = self.config.layers, asked.kinds
        loops = asked.loops or loops_of(specs, kinds)
        first = [group.start for group in members(loops)]
        graph, weights = nnx.split(self.layers)
        none = (None,) * len(first)
        own, past = grouped(loops, weights) if trained else none, asked.past or none

        def step(depth: Depth, carry: Any, item: Any):
            (x, state), (given, before) = carry, item
            if given is None:  # read where they lie

                def read(stack: Array) -> Array:
                    return jax.lax.dynamic_index_in_dim(stack, depth.layer, 0, False)

                given = jax.tree.map(read, weights)

            def attend(inputs: LayerInputs):
                return asked.step(inputs, state, *((before,) if asked.past else ()))

            layer: Layer = nnx.merge(graph, given)
            at = first[depth.group]
            depth = dataclasses.replace(depth, kind=kinds[at] if kinds else None)
            x, (state, left) = layer(place(x), positions, specs[at].kind, depth, attend)
            return (x, state), (left, x if streams else ())

        carry, outs = over(
            loops,
            step,
            (self.embed(tokens), asked.state),
            tuple(zip(own, past, strict=True)),
            remat=remat,
            apart=trained,
            unroll=unroll,
        )
        left, seen = zip(*outs, strict=True)
        return Pass(
            hidden=self.norm(carry[0]),
            state=carry[1],
            left=left,
            streams=seen,
            loops=loops,
        )

    def logits(self, hidden: Float[Array, "*shape E"]) -> Float[Array, "*shape V"]:
        """Next-token logits in float32."""
        if self.head is None:
            rows, contract = self.embedding[...], 1
        else:
            rows, contract = self.head.kernel[...], 0
        hidden = hidden.astype(rows.dtype)
        out = product(hidden, rows, contract=contract, dtype=jnp.float32)
        cap = self.config.final_softcap
        return out if cap is None else cap * jnp.tanh(out / cap)


def _stacked(layers: list[Layer]) -> Layer:
    """One layer with the weights of all of them along a leading axis."""
    parts = [nnx.split(layer) for layer in layers]
    graph, _ = parts[0]
    weights = jax.tree.map(lambda *x: jnp.stack(x), *(held for _, held in parts))
    return nnx.merge(graph, weights)


def _head(config: DecoderConfig, dtype, rngs: nnx.Rngs) -> Linear:
    e, v, std = config.hidden_size, config.vocab_size, config.init_std
    return Linear(e, v, bias=False, std=std, dtype=dtype, rngs=rngs)
