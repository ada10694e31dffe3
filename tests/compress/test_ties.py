"""Scores that are equal up to rounding go by position, in a batch as alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.budgets import Uniform
from kvjax.cache import KVCache, levelled
from kvjax.codecs import AbstractEncoded, LowRank
from kvjax.compress.config import Compression, Eviction
from kvjax.compress.observe import observe
from kvjax.compress.priorities import priorities_of
from kvjax.compress.survey import survey
from kvjax.depth import Depth
from kvjax.models import Decoder
from kvjax.prefills import Dense
from kvjax.rope import Rope
from kvjax.schedules import EveryTokens
from kvjax.scorers import ExpectedAttention, KNorm
from tests import reference
from tests.compress.samples import Sample, draw, layer_spec
from tests.models.samples import CONFIGS
from tests.small import PRESETS, VOCAB, preset, small_model

ROOM = 16
EVERY = pytest.mark.parametrize("name", PRESETS)


def test_levelled_joins_what_rounding_parts():
    x = np.float32(3.0)
    up = np.nextafter(x, np.float32(4))
    row = [x, 5.0, up, -np.inf, np.inf, 0.0, 3.001, np.nextafter(up, np.float32(4))]
    got = np.asarray(jax.jit(levelled)(jnp.asarray([row, row[::-1]], jnp.float32)))
    want = np.array([x, 5.0, x, -np.inf, np.inf, 0.0, 3.001, x], np.float32)
    np.testing.assert_array_equal(got, [want, want[::-1]])


def test_levelled_passes_gradients_on():
    x = jnp.asarray([3.0, 3.0000002, 1.0])
    slope = jax.jit(jax.grad(lambda x: jnp.sum(levelled(x) * jnp.arange(1.0, 4.0))))
    np.testing.assert_array_equal(slope(x), [1.0, 2.0, 3.0])


@functools.partial(jax.jit, static_argnums=2)
def decoded(held: AbstractEncoded, positions, rope):
    """What codes stand for."""
    return held.decode(positions, rope)


def stored(cache: KVCache, row: int) -> list[np.ndarray]:
    """Positions that a row holds, and the numbers that are held there."""
    found = []
    for number, layer in enumerate(cache.layers):
        found += cache.kept_positions(number)[row]
        for part in (*layer.parts, layer.tail):
            live = np.asarray(part.positions)[row] >= 0
            for side in ("keys", "values"):
                x = getattr(part, side, None)
                if isinstance(x, AbstractEncoded):
                    x = decoded(x, part.positions, layer.spec.rope)
                found += [] if x is None else [np.asarray(x)[row][live]]
    return found


def assert_rows_are_what_they_are_alone(
    name: str, rounds: int, low: int, high: int, model: Decoder | None = None
):
    """Bit by bit, what is kept and what is stored, of rows that repeat tokens.

    Prefills that leave blocks out sum as many as the widest row has: what is stored
    is then what it is alone but for rounding. So is what is made of factors, by a
    product of as many slots as there are.
    """
    model = small_model() if model is None else model
    rng, c = np.random.default_rng(0), preset(name)
    factors = any(isinstance(x, LowRank) for x in c.parts[0].store.codecs)
    exactly = isinstance(c.prefill, Dense) and not factors
    for _ in range(rounds):
        lengths = rng.integers(low, high, 4).astype(np.int32)
        lengths[0] = high
        tokens = rng.integers(0, VOCAB, (4, high)).astype(np.int32)
        tokens[::2] %= 5
        _, cache = kvjax.prefill(model, tokens, lengths, c, max_new_tokens=ROOM)
        for row, n in enumerate(lengths):
            alone = tokens[row : row + 1, :n]
            _, one = kvjax.prefill(model, alone, None, c, max_new_tokens=ROOM)
            for mine, other in zip(stored(cache, row), stored(one, 0), strict=True):
                # Of the largest number: that is what the others were summed with.
                most = np.abs(other).max(initial=0)
                off = 0 if exactly or mine.dtype.kind == "i" else 1e-5 * most
                np.testing.assert_allclose(mine, other, rtol=0, atol=off)


@pytest.mark.sweep(1, 8)
@EVERY
def test_a_row_of_a_batch_is_the_row_alone(name):
    assert_rows_are_what_they_are_alone(name, rounds=2, low=36, high=110)


@pytest.mark.sweep(1, 8)
@pytest.mark.parametrize("name", ["none", "knorm", "expected_attention"])
@pytest.mark.parametrize("family", [*CONFIGS, "wide"])
def test_sums_of_few_features_are_the_same_in_any_batch(family, name):
    """XLA sums 16 to 63 numbers in another order in another batch."""
    fields = {"init_std": 0.3, "vocab_size": VOCAB, "max_positions": 256}
    if family == "wide":
        fields |= {"hidden_size": 40, "intermediate_size": 56, "head_dim": 12}
        fields |= {"rope": Rope(head_dim=12)}
    config = dataclasses.replace(CONFIGS.get(family, CONFIGS["qwen3"]), **fields)
    model = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert_rows_are_what_they_are_alone(name, 1, 36, 110, model)


@pytest.mark.slow
@pytest.mark.sweep(0, 8)
@pytest.mark.optimized
@EVERY
def test_rows_of_many_lengths_are_what_they_are_alone(name):
    assert_rows_are_what_they_are_alone(name, rounds=12, low=36, high=560)


def test_while_decoding_the_newest_of_equals_leaves():
    """A body that is full holds what a whole prompt of the same tokens would."""
    model = small_model()
    tokens = np.random.default_rng(0).integers(0, 4, (2, 60)).astype(np.int32)
    evict = Eviction(score=KNorm(), budget=Uniform(slots=24))
    _, whole = kvjax.prefill(model, tokens, None, Compression(evict=evict))
    for interval in (1, 4):
        c = Compression(evict=evict, schedule=EveryTokens(interval=interval))
        _, cache = kvjax.prefill(model, tokens[:, :40], None, c, max_new_tokens=ROOM)
        _, cache = kvjax.extend(model, cache, tokens[:, 40:])
        # Of the first layer alone, whose keys no eviction changes.
        for ours, theirs in zip(
            cache.kept_positions(0), whole.kept_positions(0), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def priorities(sample: Sample, evict: Eviction) -> np.ndarray:
    """What chooses the tokens of a sample, `[B, K, S]`."""
    c = Compression(evict=evict)
    specs = (sample.inputs.spec,) * sample.inputs.spec.num_layers

    @jax.jit
    def run(inputs, lengths):
        found = survey(c, specs, lengths, inputs.k.shape[-2], inputs.k.dtype)
        seen = observe(inputs, lengths, found.layouts[0].plan, None)
        share, held = found.of(Depth(layer=0)), inputs.held(lengths)
        return priorities_of(seen, held, lengths, evict, share)

    return np.asarray(run(sample.inputs, jnp.asarray(sample.lengths, jnp.int32)))


@pytest.mark.parametrize("epsilon", [0.0, 1e-30])
def test_a_sharp_head_does_not_make_tokens_equal(epsilon):
    """Most expected weights are below what float32 holds, and still in order."""
    sample = draw(3, layer_spec(4, 2, 16), (96, 61))
    inputs = sample.inputs
    sharp = Sample(
        inputs=type(inputs)(**{**vars(inputs), "q": 24 * inputs.q}),
        lengths=sample.lengths,
    )
    score = ExpectedAttention(n_future=16, epsilon=epsilon)
    ours = priorities(sharp, Eviction(score=score, budget=Uniform(keep=0.5)))
    for row, n in enumerate(sharp.lengths):
        theirs = reference.score_expected_attention(
            *sharp.row(row), inv_freq=sharp.inv_freq, n_future=16, epsilon=epsilon
        )
        if epsilon == 0.0:
            assert (theirs < np.finfo(np.float32).tiny).mean() > 0.3
        for mine, other in zip(ours[row, :, :n], theirs, strict=True):
            order = np.argsort(-mine, kind="stable")
            np.testing.assert_array_equal(order, np.argsort(-other, kind="stable"))
