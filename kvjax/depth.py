"""Layers that compute the same are one loop, whatever the number of layers.

What they compute follows from their `kind`, anything hashable. What differs between
layers of one kind is data, looked up by the number of the layer: the body of a loop
sees that number traced, so that nothing can depend on it without saying so.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

PERIOD = 8
"""Longest pattern of kinds that is looked for; a loop's body holds one pattern."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth:
    """Where in a model a layer is.

    Attributes:
        layer: its number, from 0; traced in a loop.
        turn: its number in its group; traced in a loop.
        group: which of the groups of `members` it belongs to.
        kind: what attention said of the group's layers, see `models.decoder`.
    """

    layer: Any = 0
    turn: Any = 0
    group: int = dataclasses.field(default=0, metadata={"static": True})
    kind: Any = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Layers `first .. first + period * turns`, of kinds that repeat."""

    first: int
    period: int = 1
    turns: int = 1

    @property
    def stop(self) -> int:
        """The first layer behind it."""
        return self.first + self.period * self.turns


Step = Callable[[Depth, Any, Any], tuple[Any, Any]]
"""One layer: `(depth, state, x) -> (state, out)`."""


def plan(kinds: Sequence[Hashable]) -> tuple[Loop, ...]:
    """Loops over layers of these kinds that leave the fewest layers to compile."""
    loops, first = [], 0
    while first < len(kinds):
        found = Loop(first=first)
        for period in range(1, PERIOD + 1):
            turns = _turns(kinds, first, period)
            if period * (turns - 1) > found.period * (found.turns - 1):
                found = Loop(first=first, period=period, turns=turns)
        loops.append(found)
        first = found.stop
    return tuple(loops)


def _turns(kinds: Sequence[Hashable], first: int, period: int) -> int:
    """How often the `period` kinds from `first` on follow each other."""
    pattern = list(kinds[first : first + period])
    turns, at = 0, first
    while len(pattern) == period and list(kinds[at : at + period]) == pattern:
        turns, at = turns + 1, at + period
    return max(turns, 1)


def members(loops: Sequence[Loop]) -> tuple[range, ...]:
    """The layers of every group: of each place in the pattern of each loop."""
    return tuple(
        range(loop.first + place, loop.stop, loop.period)
        for loop in loops
        for place in range(loop.period)
    )


def grouped(loops: Sequence[Loop], tree: Any) -> tuple[Any, ...]:
    """Of arrays `[L, ...]`, those of each group; no copy where one loop is all."""
    return tuple(
        jax.tree.map(lambda x, g=group: x[g.start : g.stop : g.step], tree)
        for group in members(loops)
    )


def in_order(loops: Sequence[Loop], groups: Sequence[Any]) -> Any:
    """Arrays of all groups as one `[L, ...]`, in the order of the layers."""
    order = np.argsort(np.concatenate([list(group) for group in members(loops)]))
    if len(groups) == 1:
        return groups[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x)[order], *groups)


def regrouped(
    loops: Sequence[Loop], groups: Sequence[Any], wanted: Sequence[Loop]
) -> tuple[Any, ...]:
    """What `groups` hold of all layers, in the groups of other loops.

    The layers of a new group must have been in groups of one structure.
    """
    if tuple(loops) == tuple(wanted):
        return tuple(groups)
    place = {
        layer: (group, turn)
        for group, numbers in enumerate(members(loops))
        for turn, layer in enumerate(numbers)
    }

    def together(numbers: range) -> Any:
        places = [place[layer] for layer in numbers]
        pieces = [
            jax.tree.map(lambda x, at=at: x[np.array(at)], groups[group])
            for group, at in _runs(places)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)

    return tuple(map(together, members(wanted)))


def _runs(places: Sequence[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Neighbours of one group together."""
    runs: list[tuple[int, list[int]]] = []
    for group, turn in places:
        if not runs or runs[-1][0] != group:
            runs.append((group, []))
        runs[-1][1].append(turn)
    return runs


def over(
    loops: Sequence[Loop],
    step: Step,
    state: Any,
    xs: Sequence[Any] | None = None,
    *,
    remat: bool = False,
    apart: bool = False,
    unroll: bool = False,
) -> tuple[Any, tuple[Any, ...]]:
    """`step` over all layers in order.

    Args:
        loops: see `plan`.
        step: what a layer does.
        state: what layers hand on; its shapes never change.
        xs: for every group what its layers are given, stacked along a first axis.
        remat: recompute each layer in the backward pass instead of storing it.
        apart: keep what does not change from layer to layer inside of the loops. Where
            there is a backward pass, JAX and XLA would else compute it in front of
            them, masks above all, and keep all of it.
        unroll: no loops in the program after all.

    Returns:
        The last state, and for every group what its layers returned, stacked.
    """
    outs: list[Any] = []
    for loop in loops:
        group = len(outs)
        mine = tuple(xs[group : group + loop.period]) if xs else (None,) * loop.period
        rolled = loop.turns > 1 and not unroll
        body = _body(loop, step, group, remat, rolled)
        if rolled:
            given = (jnp.arange(loop.turns, dtype=jnp.int32), mine)
            looped = _apart(body, state, given) if apart else body
            state, made = jax.lax.scan(looped, state, given)
        else:
            found = []
            for turn in range(loop.turns):
                item = jax.tree.map(lambda x, t=turn: x[t], mine)
                state, out = body(state, (turn, item))
                found.append(out)
            made = jax.tree.map(lambda *x: jnp.stack(x), *found)
        outs += made
    return state, tuple(outs)


def _body(loop: Loop, step: Step, group: int, remat: bool, rolled: bool):
    """One turn of a loop."""

    def body(state: Any, given: Any) -> tuple[Any, tuple[Any, ...]]:
        turn, items = given
        made = []
        for place, item in enumerate(items):

            def one(state: Any, turn: Any, item: Any, place: int = place):
                layer = turn * loop.period + loop.first + place
                depth = Depth(layer=layer, turn=turn, group=group + place)
                return step(depth, state, item)

            # A loop keeps XLA from merging the passes; no barrier is needed for that.
            run = jax.checkpoint(one, prevent_cse=not rolled) if remat else one
            state, out = run(state, turn, item)
            made.append(out)
        return state, tuple(made)

    return body


def _apart(body: Any, state: Any, given: Any):
    """`body` whose closed-over arrays hang on its state."""
    item = jax.tree.map(lambda x: x[0], given)
    closed, shapes = jax.make_jaxpr(body, return_shape=True)(state, item)
    tree = jax.tree.structure(shapes)

    def run(state: Any, given: Any):
        state, held = jax.lax.optimization_barrier((state, closed.consts))
        inputs = jax.tree.leaves((state, given))
        return jax.tree.unflatten(
            tree, jax.core.eval_jaxpr(closed.jaxpr, held, *inputs)
        )

    return run
