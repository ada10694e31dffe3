"""Rotated keys in Lloyd-Max levels: against the reference, and in every cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.cache import Pages, Ragged, Slots
from kvjax.codecs import (
    AbstractCodec,
    Affine,
    Hadamard,
    HadamardArray,
    LloydMax,
    LloydMaxArray,
    Plain,
    PlainArray,
)
from kvjax.codecs._hadamard import signs_of, walsh_hadamard
from kvjax.codecs._lloyd_max import MOST, levels_of
from kvjax.pallas_kernels.quantized import numbers
from kvjax.rope import Rope
from tests.reference import turboquant as reference
from tests.small import HEAD_DIM, LENGTHS, ROWS, assert_forms_agree, batch, small_model

B, K, S = 2, 2, 24
BITS = (4, 3, 2)
KEYS = {"type": "hadamard", "of": {"type": "lloyd_max", "bits": 4}}
VALUES = {"type": "affine", "bits": 4, "axis": "token", "group": None}
CODES = {"store.keys": KEYS, "store.values": VALUES}
GIVEN_BITS = pytest.mark.parametrize("bits", BITS)


def normal(seed: int, width: int = 32) -> np.ndarray:
    """`[B, K, S, D]` of several lengths, with an outlier channel as keys have."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, K, S, width)) * rng.gamma(1, size=(B, K, S, 1))
    x[..., 3] *= 20
    return x.astype(np.float32)


def encode(codec: AbstractCodec, x: np.ndarray | jax.Array, live=None) -> Any:
    live = np.ones(x.shape[:-1], bool) if live is None else live
    nowhere = jnp.zeros(x.shape[:-1], jnp.int32)
    rope = Rope(head_dim=x.shape[-1])
    run = jax.jit(lambda x, live, at: codec.encode(x, live, at, rope))
    return run(jnp.asarray(x), jnp.asarray(live), nowhere)


def decode(encoded: Any) -> np.ndarray:
    """What it stands for; these codecs know no positions."""
    return np.asarray(jax.jit(lambda x: x.decode(None, None))(encoded))


def turned(bits: int, seed: int = 0) -> Hadamard:
    return Hadamard(of=LloydMax(bits=bits), seed=seed)


@pytest.mark.parametrize("width", [2, 32, 128])
def test_the_transform_is_that_of_the_reference(width):
    x = np.random.default_rng(0).normal(size=(3, 5, width)).astype(np.float32)
    turn = jax.jit(walsh_hadamard)
    ours = np.asarray(turn(jnp.asarray(x)))
    np.testing.assert_allclose(ours, x @ reference.hadamard(width), atol=1e-5)
    np.testing.assert_allclose(turn(jnp.asarray(ours)), x, atol=1e-5)


@pytest.mark.parametrize("width", [4, 32, 128, 256])
@pytest.mark.parametrize("bits", [1, *BITS])
def test_levels_are_those_of_the_reference(width, bits):
    theirs = reference.lloyd_max_levels(width, bits)
    np.testing.assert_allclose(levels_of(width, bits), theirs, atol=1e-10)


@GIVEN_BITS
@pytest.mark.parametrize("width", [32, 128])
def test_codes_are_those_of_the_reference(bits, width):
    x = normal(bits, width)
    held = encode(turned(bits), x)
    assert isinstance(held, HadamardArray) and isinstance(held.of, LloydMaxArray)
    packed = np.asarray(held.of.codes)
    assert packed.dtype == np.uint8 and packed.shape == (B, K, S, width * bits // 8)
    signs = signs_of(0, width).astype(float)
    codes, norms = reference.encode(x, signs, bits=bits)
    ours = np.stack(
        [reference.unpack(row, bits) for row in packed.reshape(B * K * S, -1)]
    )
    ours = ours.reshape(x.shape)
    # A coordinate between two levels may go either way.
    unit = reference.rotate_in(x / norms[..., None], signs)
    levels = reference.lloyd_max_levels(width, bits)
    far = np.abs(unit[..., None] - (levels[1:] + levels[:-1]) / 2).min(-1) > 1e-6
    assert far.mean() > 0.999
    np.testing.assert_array_equal(ours[far], codes[far])
    for row, stream in zip(
        ours.reshape(B * K * S, -1), packed.reshape(B * K * S, -1), strict=True
    ):
        np.testing.assert_array_equal(reference.pack(row, bits), stream)
    # The scale is in float16, which has 11 bits.
    theirs = reference.decode(ours, norms, signs, bits=bits)
    error = np.linalg.norm(decode(held) - theirs, axis=-1)
    assert (error <= norms * 2.0**-11 * 1.01).all()


@GIVEN_BITS
def test_errors_are_those_of_the_reference(bits):
    x, signs = normal(7, 128), signs_of(0, 128).astype(float)

    def error(back: np.ndarray) -> float:
        return (((back - x) ** 2).sum(-1) / (x.astype(float) ** 2).sum(-1)).mean()

    ours = error(decode(encode(turned(bits), x)))
    theirs = error(reference.read_back(x, signs, bits=bits))
    np.testing.assert_allclose(ours, theirs, rtol=0.01)
    # What the rotation is for: with one channel above all others.
    assert ours < error(decode(encode(LloydMax(bits=bits), x))) / 2


@GIVEN_BITS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_codes(bits, dtype):
    held = encode(turned(bits), jnp.asarray(normal(0), dtype))
    leaves = jax.tree.leaves(held)
    assert held.slots == S and decode(held).dtype == dtype
    assert turned(bits).slot_bytes(32, 4) == 32 * bits / 8 + 2
    assert sum(x.nbytes for x in leaves) == B * K * S * turned(bits).slot_bytes(32, 4)


def test_nothing_is_zero_and_nothing_is_lost():
    """Zero vectors, free slots with NaN, and lengths beyond float16."""
    x = normal(2)
    x[0, 0, 0] = 0
    live = np.ones(x.shape[:-1], bool)
    live[:, :, 5:9] = False
    dirty = np.where(live[..., None], x, np.nan)
    held = encode(turned(4), dirty, live)
    back = decode(held)
    assert np.isfinite(back).all()
    assert not back[0, 0, 0].any() and not back[:, :, 5:9].any()
    clean = encode(turned(4), np.where(live[..., None], x, 0))
    for ours, theirs in zip(*map(jax.tree.leaves, (held, clean)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for size in (1e30, 1e-30, 1e-40):
        scaled = (x.astype(float) * size).astype(np.float32)
        held = encode(turned(4), scaled)
        scale = np.asarray(numbers(held.of.scale), float)
        assert np.isfinite(scale).all() and np.isfinite(decode(held)).all()
        some = np.abs(x).max(-1, keepdims=True) > 0
        np.testing.assert_array_equal(scale[some], MOST if size > 1 else 0)


@pytest.mark.parametrize("codec", [turned(3), turned(4), LloydMax(bits=2)])
def test_slots_are_held_by_themselves(codec):
    """Flat as per head, and in blocks that can be put anywhere."""
    x = normal(4)
    whole = encode(codec, x)
    back = decode(whole)
    flat = encode(codec, x.reshape(B, K * S, -1))
    np.testing.assert_array_equal(decode(flat), back.reshape(B, K * S, -1))
    np.testing.assert_array_equal(decode(whole.block(8, 8)), back[:, :, 8:16])
    stacked = jax.tree.map(lambda a: jnp.stack([jnp.zeros_like(a), a]), whole)
    np.testing.assert_array_equal(decode(stacked.block(8, 8, 1)), back[:, :, 8:16])
    block = encode(codec, normal(5)[:, :, :8])
    rows, start = jnp.asarray([True, False]), jnp.asarray([16, 0], jnp.int32)
    want = back.copy()
    want[0, :, 16:] = decode(block)[0]
    np.testing.assert_array_equal(decode(whole.put(block, start, rows)), want)
    found = stacked.put(block, start, rows, 1)
    np.testing.assert_array_equal(decode(jax.tree.map(lambda a: a[1], found)), want)
    assert not any(a[0].any() for a in jax.tree.leaves(found))


COMBINATIONS: dict[str, tuple[str, dict[str, Any], type]] = {
    "snapkv": ("snapkv", {"evict.score.window": 8}, Slots),
    "ragged heads": ("adakv_snapkv", {"evict.score.window": 8}, Ragged),
    "pooled layers": (
        "pyramidkv",
        {"evict.score.window": 8, "evict.budget.beta": 2.0, "evict.budget.window": 8},
        Ragged,
    ),
    "grows": ("none", {"store.residual": 32}, Slots),
    "snapkv, grows": (
        "snapkv",
        {"evict.score.window": 8, "evict.budget.keep": 0.5, "store.residual": 16},
        Slots,
    ),
    "pages": (
        "none",
        {"read": {"type": "quest", "page": 8, "keep": 0.5}, "store.residual": 16},
        Pages,
    ),
    "keys alone": ("decoupled", {"evict.score.window": 8}, Slots),
    "3 bits": ("none", {"store.keys.of.bits": 3}, Slots),
}


def combined(name: str) -> kvjax.Compression:
    preset, fields, _ = COMBINATIONS[name]
    return kvjax.compression(preset, **(CODES | fields))


@pytest.mark.sweep(1, 5)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_two_forms_agree(name):
    """With what is evicted before, in every layout of a cache.

    In the first layer, whose keys are the same in both forms to the last bit: further
    up a code may flip.
    """
    pooled = name == "pooled layers"
    model, c = small_model(layers=2 if pooled else 1), combined(name)
    assert_forms_agree(model, c, flips=pooled)
    _, cache = kvjax.prefill(model, batch()[0], LENGTHS, c, max_new_tokens=64)
    for layer in cache.layers:
        part = layer.parts[0]
        assert isinstance(part, COMBINATIONS[name][2])
        assert isinstance(part.keys, HadamardArray)  # type: ignore[union-attr]


def test_the_edges_are_plain():
    """The first and the last layers; the bytes between are those of codes."""
    model, fields = small_model(layers=4), {"layers.0.stop": 1, "layers.1.first": -1}
    c = kvjax.compression("turboquant", **fields, **{"store.residual": 0})
    _, cache = kvjax.prefill(model, batch()[0], LENGTHS, c, max_new_tokens=64)
    slots = ROWS * 2 * int(LENGTHS.max())
    for number, layer in enumerate(cache.layers):
        (part,) = layer.parts
        assert isinstance(part, Slots)
        edge = number in (0, 3)
        assert isinstance(part.keys, PlainArray if edge else HadamardArray)
        size = slots * c.at(number, 4).store.slot_bytes(HEAD_DIM, 4)
        assert sum(x.nbytes for x in jax.tree.leaves(part)) == size
        assert (size < slots * 2 * HEAD_DIM * 4 / 5) != edge
    deep = [kvjax.compression("turboquant").at(n, 6).store.plain for n in range(6)]
    assert deep == [True, True, False, False, True, True]


def test_gradient_passes_straight_through():
    """To the weights of keys and values, which a later token sees by codes alone."""
    graph, params = nnx.split(small_model(layers=1))
    _, _, whole = batch()
    total = LENGTHS + 1

    def loss(params, c):
        model = nnx.merge(graph, params)
        logits = kvjax.simulate(model, whole[:, : total.max()], total, LENGTHS, c)
        return jnp.sum(jax.nn.log_softmax(logits[np.arange(ROWS), LENGTHS])[:, 0])

    ours, plain = (
        jax.grad(loss)(params, c).layers.attention
        for c in (kvjax.compression("none", **CODES), kvjax.Compression())
    )
    for side in ("k", "v"):
        slope, other = (np.asarray(x[side].kernel[...]) for x in (ours, plain))
        assert np.isfinite(slope).all()
        size = np.linalg.norm(slope) * np.linalg.norm(other)
        assert size > 0 and (slope * other).sum() / size > 0.7


def test_other_bits():
    c = kvjax.compression("turboquant")
    assert turned(4).with_bits(3) == turned(3)
    assert c.with_bits(2).store.keys == turned(2)
    assert c.with_bits(2).store.values == Affine(bits=2, axis="token", group=None)
    with pytest.raises(ValueError, match="must be one of \\[1, 2, 4, 8\\]; got 3"):
        c.with_bits(3)  # of the values
    with pytest.raises(ValueError, match="must be one of"):
        turned(4).with_bits(8)
    three = kvjax.compression("turboquant", **{"store.keys.of.bits": 3})
    assert three.store == dataclasses.replace(c.store, keys=turned(3))


def test_signs_are_those_of_the_seed():
    x = normal(6)
    one, same, other = (encode(turned(4, seed), x) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.of.codes, same.of.codes)
    assert (one.of.codes != other.of.codes).mean() > 0.5
    assert set(signs_of(0, 128)) == {-1.0, 1.0}


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="got of=Plain. Use a codec with bits"):
        Hadamard(of=Plain())
    with pytest.raises(ValueError, match="seed` must be an integer in"):
        turned(4, seed=-1)
    with pytest.raises(ValueError, match="must be one of"):
        LloydMax(bits=5)
    with pytest.raises(ValueError, match="power of two; got head_dim=96"):
        turned(4).validate(96)
    with pytest.raises(ValueError, match="must fill bytes; got head_dim=4"):
        turned(3).validate(4)
    for width in (8, 64, 256):
        turned(3).validate(width)
