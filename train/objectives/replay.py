"""What a model says of rows that it reads chunk by chunk, and its gradient.

    forward    chunk 0 ─▶ held ─▶ chunk 1 ─▶ held ─▶ …      logs which tokens stay
    backward   … ◀─ chunk 1 again ◀─ slope of held ◀─        repeats these decisions

Between two chunks a layer holds what its compression leaves, so a pass needs no more
memory for a longer row. The gradient is that of the chunked pass itself: it flows
through every token that is held, through as many chunks as it is held for. Decisions
are constants.

The backward pass takes the chunks in reverse and computes each again. It needs what was
held in front of each. Of `n` chunks the forward pass keeps that of about `sqrt(n)`, at
the starts of segments; the chunks of a segment are repeated once more to have the rest.
So of what is held there are `2 sqrt(n)` copies, and the work is one more forward pass.
With `segments` off there are `n` copies and none is repeated.

Layers that drop nothing hold one slot per token. They are not copied: what they hold at
the end holds what they held before, and a chunk reads only the slots in front of it.

Gradients of weights are summed over the chunks in float32, whatever the passes use.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array

from kvjax.compress.rolled import Rolled
from kvjax.models.chunked import Chunking, Kept, plainly
from kvjax.models.decoder import Decoder
from kvjax.train.objectives.losses import TokenScores, scores_of
from kvjax.train.objectives.passes import along_rows, held_along_rows
from kvjax.types import pytree


@pytree
class Chunk:
    """Tokens of a chunk; of several, with axes in front.

    Attributes:
        tokens, positions: theirs.
        targets: the tokens behind them.
        wanted: hidden states of the teacher, or None.
        start: the chunk's first column in its rows.
    """

    tokens: Array
    positions: Array
    targets: Array
    wanted: Array | None
    start: Array


@pytree
class Arrays:
    """What scores depend on: weights of a model and of its teacher, and rows."""

    params: Any
    guide: Any
    rows: Chunk  # [segments, chunks, B, T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """What is static of a pass.

    Attributes:
        model, teacher: their structures; no teacher: None.
        chunking: how chunks are read.
        remat, unroll: as of `Decoder.run`.
    """

    model: Any
    teacher: Any
    chunking: Chunking
    remat: bool
    unroll: bool

    def decoder(self, arrays: Arrays) -> Decoder:
        """The model with its weights."""
        return nnx.merge(self.model, arrays.params)

    def scores(
        self, model: Decoder, arrays: Arrays, chunk: Chunk, hidden: Array
    ) -> TokenScores:
        """What the model says of the tokens behind those of a chunk."""
        guided = self.teacher is not None
        teacher = nnx.merge(self.teacher, arrays.guide) if guided else None
        return scores_of(model, hidden, chunk.targets, teacher, chunk.wanted)

    @property
    def run(self) -> dict[str, Any]:
        """What every pass is told."""
        return {"unroll": self.unroll, "place": along_rows}


class _Log(NamedTuple):
    """What a forward pass leaves for the backward one, by groups of layers.

    Attributes:
        before: held in front of every segment; None where nothing is dropped.
        kept: decisions, `[segments, chunks, ...]`; None likewise.
        whole: what layers that drop nothing hold at the end; None for the others.
    """

    before: tuple[Rolled | None, ...]
    kept: Kept
    whole: tuple[Rolled | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scores_in_chunks(how: How, arrays: Arrays) -> TokenScores:
    """Scores of all tokens, `[segments, chunks, B, T]`, with the gradient above."""
    return _forward(how, arrays)[0]


def _forward(how: How, arrays: Arrays) -> tuple[TokenScores, _Log]:
    model, chunking = how.decoder(arrays), how.chunking

    def one(held, chunk: Chunk):
        given = (held, chunk.tokens, chunk.positions)
        hidden, held, kept = chunking.read(model, *given, **how.run)
        return held, (how.scores(model, arrays, chunk, hidden), kept)

    def segment(held, chunks: Chunk):
        before = _of(held.groups, chunking, grows=False)
        held, left = jax.lax.scan(one, held, chunks)
        return held, (before, *left)

    lengths = jnp.max(arrays.rows.positions, axis=(0, 1, 3)) + 1
    held = chunking.start(model.config, lengths)
    held, found = jax.lax.scan(segment, held_along_rows(held), arrays.rows)
    before, scores, kept = found
    whole = _of(held.groups, chunking, grows=True)
    return scores, _Log(before=before, kept=kept, whole=whole)


def _of(groups: Any, chunking: Chunking, grows: bool) -> tuple[Rolled | None, ...]:
    """Tokens held by the groups of layers that drop something, or by the others."""
    return tuple(
        plainly(group) if mine == grows else None
        for group, mine in zip(groups, chunking.grows, strict=True)
    )


def _started(how: How, given: Any) -> tuple[TokenScores, Any]:
    """`_forward`, and which of its arguments want a gradient.

    Of frozen weights none is computed: they may be most of a model.
    """

    def is_primal(x: Any) -> bool:
        return isinstance(x, CustomVJPPrimal)

    def those(perturbed: bool) -> Any:
        return jax.tree.map(
            lambda x: x.value if x.perturbed == perturbed else None,
            given,
            is_leaf=is_primal,
        )

    arrays = jax.tree.map(lambda x: x.value, given, is_leaf=is_primal)
    scores, log = _forward(how, arrays)
    return scores, (those(True), those(False), log)


def _backward(how: How, saved: Any, slopes: TokenScores):
    trained, fixed, log = saved
    rows = _both(trained, fixed).rows
    slopes = jax.tree.map(_instantiated, slopes, is_leaf=_is_symbolic)
    asked = (slopes.loss, slopes.apart)
    replay = _Replay(how=how, fixed=fixed, whole=log.whole)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    behind = jax.tree.map(lambda x: jnp.zeros_like(x[0]), _floats(log.before))
    grown = jax.tree.map(lambda x: jnp.zeros(x.shape, "f4"), _floats(log.whole))
    start = (zeros, held_along_rows(behind), held_along_rows(grown))

    def segment(carry, given):
        before, chunks, kept, slope = given
        held = replay.held(trained, before, chunks, kept)
        one = functools.partial(replay.pulled, trained)
        return jax.lax.scan(one, carry, (held, chunks, kept, slope), reverse=True)

    given = (log.before, rows, log.kept, asked)
    (found, *_), _ = jax.lax.scan(segment, start, given, reverse=True)
    found = jax.tree.map(lambda x, like: x.astype(like.dtype), found, trained)
    return (found,)


scores_in_chunks.defvjp(_started, _backward, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Replay:
    """The chunks once more, with the decisions of the forward pass."""

    how: How
    fixed: Any
    whole: tuple[Rolled | None, ...]

    def held(self, trained: Any, before: Any, chunks: Chunk, kept: Kept) -> Any:
        """What is held in front of every chunk of a segment, where any is dropped."""
        count = chunks.tokens.shape[0]
        stack = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (count, *x.shape)).at[1:].set(0), before
        )

        def one(stack, index):
            at = functools.partial(jax.tree.map, lambda x: x[index])
            _, left, _ = self._run(trained, at(stack), at(chunks), at(kept), False)
            stack = jax.tree.map(lambda x, y: x.at[index + 1].set(y), stack, left)
            return stack, None

        if count == 1 or not jax.tree.leaves(stack):
            return stack
        return jax.lax.scan(one, stack, jnp.arange(count - 1))[0]

    def pulled(self, trained: Any, carry: Any, given: Any):
        """Slopes in front of a chunk, of those behind it and of its own."""
        (total, behind, grown), (held, chunk, kept, slope) = carry, given
        width = chunk.tokens.shape[1]

        def run(trained, floats, whole):
            mine = dataclasses.replace(self, whole=_with(self.whole, whole))
            before = _with(held, floats)
            scores, left, own = mine._run(trained, before, chunk, kept, True)
            assert scores is not None
            return (scores.loss, scores.apart), _floats(left), _floats(own)

        given = (trained, _floats(held), _floats(self.whole))
        _, pull = jax.vjp(run, *given)
        own = jax.tree.map(
            lambda x, like: jax.lax.dynamic_slice_in_dim(
                x, chunk.start, width, axis=3
            ).astype(like.dtype),
            grown,
            _floats(self.whole),
        )
        more, behind, read = pull((slope, behind, own))
        add = functools.partial(jax.tree.map, lambda x, y: x + y.astype(jnp.float32))
        return (add(total, more), behind, add(grown, read)), None

    def _run(self, trained, before, chunk: Chunk, kept: Kept, scored: bool):
        """Scores, what layers hold behind, and the own tokens of those that grow."""
        how, chunking = self.how, self.how.chunking
        arrays = _both(trained, self.fixed)
        model = how.decoder(arrays)
        pairs = zip(before, self.whole, strict=True)
        held = tuple(x if y is None else y for x, y in pairs)
        hidden, left = chunking.replay(
            model,
            held,
            kept,
            chunk.tokens,
            chunk.positions,
            chunk.start,
            trained=scored,
            remat=how.remat and scored,
            **how.run,
        )
        scores = how.scores(model, arrays, chunk, hidden) if scored else None
        pairs = tuple(zip(left, chunking.grows, strict=True))
        rolled = tuple(None if grows else one for one, grows in pairs)
        own = tuple(one if grows else None for one, grows in pairs)
        return scores, rolled, own


def _both(trained: Arrays, fixed: Arrays) -> Arrays:
    """All arguments, of those that have a gradient and those that have none."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, trained, fixed, is_leaf=lambda x: x is None
    )


def _floats(groups: tuple[Rolled | None, ...]) -> Any:
    """What has a gradient of what is held."""
    return tuple(None if one is None else (one.keys, one.values) for one in groups)


def _with(groups: tuple[Rolled | None, ...], floats: Any) -> tuple[Rolled | None, ...]:
    """What is held, with other keys and values."""
    return tuple(
        None if one is None else dataclasses.replace(one, keys=kv[0], values=kv[1])
        for one, kv in zip(groups, floats, strict=True)
    )


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiated(x: Any) -> Any:
    """A slope as an array; that of what has none is not looked at."""
    return jnp.zeros(x.shape, jnp.float32) if _is_symbolic(x) else x
