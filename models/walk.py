"""The layers of a decoder, one after the other, or as a loop where they are alike."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kvjax.types import LayerSpec

Stream = Float[Array, "B T E"]
Step = Callable[[Any, LayerSpec, Stream, Any], tuple[Stream, Any]]
"""One layer: `(layer, spec, x, state) -> (x, state)`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """What one layer computes; equal where two compute the same from other weights.

    Attributes:
        jaxpr: of `(weights, x, state)`.
        text: the same, printed.
        held: arrays that it closes over.
        kind: the layer's spec but for its place, which shows in `text` where it counts.
        graph: structure of the layer.
    """

    jaxpr: Any
    text: str
    held: tuple[Any, ...]
    kind: LayerSpec
    graph: Any

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Program)
            and (self.text, self.kind) == (other.text, other.kind)
            and self.graph == other.graph
            and len(self.held) == len(other.held)
            and all(map(_same, self.held, other.held))
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return False
    return bool(np.array_equal(one, other))


def walk(
    layers: Sequence[nnx.Module],
    specs: Sequence[LayerSpec],
    step: Step,
    x: Stream,
    state: Any,
    *,
    remat: bool = False,
    loop: bool = False,
) -> tuple[Stream, Any]:
    """`step` over all layers in order.

    Args:
        layers: modules of one kind.
        specs: theirs.
        step: what a layer does; with `remat` or `loop` all that it keeps is in `state`.
        x: the residual stream.
        state: what layers hand on, a pytree.
        remat: recompute each layer in the backward pass instead of storing it.
        loop: layers that follow each other and compute the same become one loop, which
            is compiled once. Whether they do is read off their traces, so that a
            compression that treats layers differently is never mistaken. Costs a copy
            of the weights of looped layers.
    """
    if not loop:
        for layer, spec in zip(layers, specs, strict=True):
            x, state = _one(layer, spec, step, remat)(x, state)
        return x, state
    programs = list(_programs(layers, specs, step, x, state))
    first = 0
    while first < len(layers):
        last = first + 1
        while last < len(layers) and programs[last] == programs[first]:
            last += 1
        if last - first == 1:
            x, state = _one(layers[first], specs[first], step, remat)(x, state)
        else:
            looped = _loop(programs[first], layers[first:last], remat)
            x, state = looped(x, state)
        first = last
    return x, state


def _one(layer: nnx.Module, spec: LayerSpec, step: Step, remat: bool):
    def run(x: Stream, state: Any) -> tuple[Stream, Any]:
        return step(layer, spec, x, state)

    return jax.checkpoint(run) if remat else run


def _loop(program: _Program, layers: Sequence[nnx.Module], remat: bool):
    def body(carry: Any, leaves: list[Array]):
        # What the layers share, masks above all, hangs on the stream here, or JAX and
        # XLA would compute it in front of the loop and keep all of it.
        carry, held = jax.lax.optimization_barrier((carry, program.held))
        inputs = (*leaves, *jax.tree.leaves(carry))
        out = jax.core.eval_jaxpr(program.jaxpr, held, *inputs)
        return jax.tree.unflatten(jax.tree.structure(carry), out), None

    def run(x: Stream, state: Any) -> tuple[Stream, Any]:
        each = [jax.tree.leaves(nnx.split(layer)[1]) for layer in layers]
        stacked = [jnp.stack(leaves) for leaves in zip(*each, strict=True)]
        # A loop keeps XLA from merging the passes; no barrier is needed for that.
        again = jax.checkpoint(body, prevent_cse=False) if remat else body
        return jax.lax.scan(again, (x, state), stacked)[0]

    return run


def _programs(
    layers: Sequence[nnx.Module],
    specs: Sequence[LayerSpec],
    step: Step,
    x: Stream,
    state: Any,
) -> Iterator[_Program]:
    """What each layer computes, in order."""
    carry = jax.eval_shape(lambda: (x, state))
    for layer, spec in zip(layers, specs, strict=True):
        graph, leaves = nnx.split(layer)

        def one(leaves, x, state, graph=graph, spec=spec):
            return step(nnx.merge(graph, leaves), spec, x, state)

        closed, carry = jax.make_jaxpr(one, return_shape=True)(leaves, *carry)
        # Functions are printed with their address. What they close over is settled by
        # the forward pass, which is printed whole, and by the spec.
        yield _Program(
            jaxpr=closed.jaxpr,
            text=re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr)),
            held=tuple(closed.consts),
            kind=dataclasses.replace(spec, index=0, head_ranks=()),
            graph=graph,
        )
