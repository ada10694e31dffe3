"""Every score, from queries in pieces and tokens in any order: the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import Memory
from kvjax.compress.observe import remember
from kvjax.scorers import AbstractScorer
from kvjax.types import EMPTY, Held, LayerInputs
from tests.compress.samples import draw, layer_spec
from tests.small import SCORES

LENGTHS, WIDTH = (96, 61, 30), 104
COUNTS = jnp.asarray((48, 20, 17), jnp.int32)
GIVEN_SCORE = pytest.mark.parametrize("name", SCORES)
SPECS = {
    "full": layer_spec(6, 2, 32),
    "window": layer_spec(4, 2, 16, window=48),
    "softcap": layer_spec(4, 1, 16, softcap=5.0),
}


@functools.lru_cache
def sample(kind: str):
    return draw(3, SPECS[kind], LENGTHS, width=WIDTH)


def in_pieces(score: AbstractScorer, kind: str, size: int) -> tuple[Memory, Held]:
    """What is remembered after chunks of `size` queries, and what is held then."""
    return jax.jit(functools.partial(_in_pieces, score, size))(sample(kind).inputs)


def _in_pieces(score: AbstractScorer, size: int, inputs: LayerInputs):
    memory, held = None, None
    for start in range(0, WIDTH, size):
        index = jnp.arange(start, min(start + size, WIDTH))[None] * jnp.ones(
            (3, 1), int
        )
        asked = inputs.taken(
            index, jnp.take_along_axis(inputs.positions, index, 1) >= 0
        )
        seen = jnp.minimum(jnp.asarray(LENGTHS), start + size)
        whole = inputs.held(seen)
        stop = min(start + size, WIDTH)
        held = dataclasses.replace(
            whole,
            k=whole.k[:, :, :stop],
            v=whole.v[:, :, :stop],
            positions=whole.positions[:, :, :stop],
        )
        memory = remember(score, memory, asked, held)
    assert memory is not None and held is not None
    return memory, held


def scores(score: AbstractScorer, memory: Memory, held: Held) -> np.ndarray:
    """Of live slots; 0 in the others."""
    found = jax.jit(type(score).score, static_argnums=0)(score, memory, held, COUNTS)
    return np.where(np.asarray(held.live), np.asarray(found), 0)


@functools.lru_cache
def one_pass(name: str, kind: str) -> np.ndarray:
    score = SCORES[name]

    @jax.jit
    def seen(inputs):
        held = inputs.held(jnp.asarray(LENGTHS))
        return remember(score, None, inputs, held), held

    return scores(score, *seen(sample(kind).inputs))


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)


@pytest.mark.sweep(6, 40)
@GIVEN_SCORE
@pytest.mark.parametrize("size", [37, 8])
@pytest.mark.parametrize("kind", SPECS)
def test_in_chunks_as_in_one_pass(name, kind, size):
    """Chunks shorter than a window, too; rows that end at different places."""
    close(
        scores(SCORES[name], *in_pieces(SCORES[name], kind, size)), one_pass(name, kind)
    )


@pytest.mark.sweep(4, 30)
@GIVEN_SCORE
@pytest.mark.parametrize("kind", SPECS)
def test_slots_in_any_order(name, kind):
    """Every head in an order of its own, with free slots in between."""
    score = SCORES[name]
    memory, held = in_pieces(score, kind, 37)
    rng = np.random.default_rng(5)
    count = WIDTH + 9
    order = rng.permuted(
        np.broadcast_to(np.arange(count), (3, *held.k.shape[1:2], count)), axis=-1
    )
    order = jnp.asarray(order)

    def move(x, empty=np.nan):
        pad = [(0, 0)] * x.ndim
        pad[2] = (0, 9)
        x = jnp.pad(x, pad, constant_values=EMPTY if x.dtype == jnp.int32 else empty)
        return jnp.take_along_axis(
            x, order.reshape(*order.shape, *(1,) * (x.ndim - 3)), axis=2
        )

    moved = dataclasses.replace(
        held,
        k=move(held.k),
        v=move(held.v),
        positions=move(held.positions),
        in_order=False,
    )
    slots = jax.tree.map(lambda x: move(x, 0), memory.slots)
    ours = scores(score, dataclasses.replace(memory, slots=slots), moved)
    theirs = np.pad(one_pass(name, kind), [(0, 0), (0, 0), (0, 9)])
    close(ours, np.take_along_axis(theirs, np.asarray(order), axis=2))
