"""Prefixes of a trained projection: codec, cache and parallel form."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.cache import Slots
from kvjax.codecs import Projected, ProjectedArray
from kvjax.codecs._projected import orthonormal
from kvjax.models import Decoder
from kvjax.rope import Rope
from tests import reference
from tests.small import HEAD_DIM, LATER, LENGTHS, ROWS, batch, small_model

B, K, S, D = 2, 2, 24, 16
ROPE = Rope(head_dim=D)
MODEL = small_model(layers=1)


def both(keep: float, **fields) -> kvjax.Compression:
    sides = {f"store.{side}.keep": keep for side in ("keys", "values")}
    return kvjax.compression("matryoshka", **(sides | fields))


def held(cache: kvjax.KVCache) -> tuple[ProjectedArray, ProjectedArray]:
    """Keys and values of the first layer's body."""
    (part,) = cache.layers[0].parts
    assert isinstance(part, Slots)
    assert isinstance(part.keys, ProjectedArray)
    assert isinstance(part.values, ProjectedArray)
    return part.keys, part.values


def samples(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers `[B, K, S, D]` and any basis `[K, D, D]`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, K, S, D)).astype(np.float32)
    return x, rng.normal(size=(K, D, D)).astype(np.float32)


def back(codec: Projected, x: np.ndarray, basis) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) + 3, x.shape[:-1])
    live = jnp.ones(x.shape[:-1], bool)
    encoded = codec.encode(jnp.asarray(x), live, positions, ROPE, jnp.asarray(basis))
    assert isinstance(encoded, ProjectedArray)
    assert encoded.coefficients.shape == (B, K, S, codec.rank(D))
    return np.asarray(encoded.decode(positions, ROPE))


@pytest.mark.parametrize("rotated", [True, False])
def test_all_coefficients_are_the_thing_itself(rotated):
    x, basis = samples(0)
    codec = Projected(keep=1.0, rotated=rotated)
    for given in (np.broadcast_to(np.eye(D, dtype=np.float32), (K, D, D)), basis):
        np.testing.assert_allclose(back(codec, x, given), x, atol=2e-5)


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("rotated", [True, False])
def test_a_prefix_is_that_of_the_reference(rank, rotated):
    x, basis = samples(rank)
    ours = back(Projected(keep=rank / D, rotated=rotated), x, basis)
    positions, turn = np.arange(S) + 3, ROPE.frequencies()
    for row, head in np.ndindex(B, K):
        plain = x[row, head].astype(float)
        if rotated:
            plain = reference.rotate(plain[None], positions, turn, inverse=True)[0]
        found = np.zeros_like(plain)
        known: list[np.ndarray] = []
        for vector in basis[head, :rank].astype(float):  # Gram and Schmidt
            for other in known:
                vector = vector - (vector @ other) * other
            known.append(vector / np.linalg.norm(vector))
            found += np.outer(plain @ known[-1], known[-1])
        if rotated:
            found = reference.rotate(found[None], positions, turn)[0]
        np.testing.assert_allclose(ours[row, head], found, atol=1e-4)


def test_what_is_orthonormal_stays():
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(K, D, D)))
    for rank in (3, D):
        found = orthonormal(jnp.asarray(q, jnp.float32), rank)
        np.testing.assert_allclose(found, q[:, :rank], atol=1e-5)


def test_dead_slots_are_never_read():
    x, basis = samples(1)
    live = np.arange(S) % 3 > 0
    dirty = np.where(live[:, None], x, np.nan)
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), x.shape[:-1])
    found = Projected().encode(
        jnp.asarray(dirty),
        jnp.broadcast_to(live, x.shape[:-1]),
        positions,
        ROPE,
        jnp.asarray(basis),
    )
    assert np.isfinite(found.decode(positions, ROPE)).all()


def test_bytes_are_those_of_the_coefficients():
    prompt, _, _ = batch()
    fields = {"store.keys.keep": 0.25, "store.values.keep": 0.1}
    c = kvjax.compression("matryoshka", **fields)
    _, cache = kvjax.prefill(MODEL, prompt, LENGTHS, c)
    assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    _, plain = kvjax.prefill(MODEL, prompt, LENGTHS)
    slots = cache.layers[0].parts[0].positions.size
    ranks = HEAD_DIM // 4, math.ceil(HEAD_DIM * 0.1)
    for side, rank in zip(held(cache), ranks, strict=True):
        assert side.coefficients.nbytes == slots * rank * 4
        assert side.basis.shape == (2, rank, HEAD_DIM)
    saved = slots * (2 * HEAD_DIM - sum(ranks)) * 4
    assert plain.nbytes - cache.nbytes == saved - 2 * sum(ranks) * HEAD_DIM * 4


def test_two_forms_agree_under_eviction():
    prompt, later, whole = batch()
    evict = kvjax.compression("knorm", **{"evict.budget.keep": 0.5}).evict
    c, total = dataclasses.replace(both(0.5), evict=evict), LENGTHS + LATER
    first, cache = kvjax.prefill(MODEL, prompt, LENGTHS, c)
    shape = (ROWS, 2, LENGTHS.max() // 2, HEAD_DIM // 2)
    assert [side.coefficients.shape for side in held(cache)] == [shape, shape]
    real, _ = kvjax.extend(MODEL, cache, later, LATER)
    logits = kvjax.simulate(MODEL, whole, total, LENGTHS, c)
    for row, n in enumerate(LENGTHS):
        ours = logits[row, n : total[row]]
        np.testing.assert_allclose(logits[row, n - 1], first[row], atol=1e-4)
        np.testing.assert_allclose(ours, real[row, : LATER[row]], atol=1e-4)


@pytest.mark.slow
def test_the_gradient_reaches_the_projections():
    """As the slope of the loss along it, with half of the coefficients."""
    graph, params = nnx.split(MODEL)
    _, _, whole = batch()
    total = LENGTHS + 1
    tokens, rows = whole[:, : total.max()], np.arange(ROWS)

    @jax.jit
    def loss(params):
        model: Decoder = nnx.merge(graph, params)
        logits = kvjax.simulate(model, tokens, total, LENGTHS, both(0.5))
        return jnp.sum(jax.nn.log_softmax(logits[rows, LENGTHS])[:, 0])

    grads = jax.grad(loss)(params)
    for side in ("key_basis", "value_basis"):
        slope = grads.layers.attention[side][...]
        size = float(jnp.linalg.norm(slope))
        assert size > 1e-4
        assert not np.any(slope[:, :, HEAD_DIM // 2 :])  # the others do not matter

        def at(step: float, side=side, slope=slope, size=size) -> float:
            model: Decoder = nnx.merge(graph, params)
            model = nnx.clone(model)
            basis = getattr(model.layers.attention, side)
            basis[...] = basis[...] + step / size * slope
            return float(loss(nnx.split(model)[1]))

        np.testing.assert_allclose((at(0.05) - at(-0.05)) / 0.1, size, rtol=0.05)


def test_what_does_not_fit():
    prompt, _, _ = batch()
    bare = Decoder(dataclasses.replace(MODEL.config, projection=None), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="this model has none. Train one"):
        kvjax.prefill(bare, prompt, LENGTHS, both(0.5))
    with pytest.raises(ValueError, match="must be a number in \\(0, 1\\]"):
        both(0.0)
    with pytest.raises(ValueError, match="takes no later blocks"):
        both(0.5, **{"store.residual": 32})
    scaled = both(0.5, **{"store.values.keep": 0.25}).with_keep(0.25)
    assert scaled.keep == 0.25 and scaled.store.values == Projected(
        keep=0.125, rotated=False
    )
