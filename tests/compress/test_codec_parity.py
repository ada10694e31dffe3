"""Codecs against the reference quantisers, and what must hold for any input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvjax.codecs import Affine, AffineArray, LowRank
from kvjax.codecs._low_rank import RANKS
from kvjax.pallas_kernels.quantized import numbers
from kvjax.rope import Rope
from tests import reference

B, K, S, D, GROUP = 2, 2, 24, 16, 8
ROPE = Rope(head_dim=D)
HALF_MAX = float(np.finfo(np.float16).max)
AXES, BITS = ("channel", "token"), (2, 4, 8)
CASES = [(bits, axis, sym) for bits in BITS for axis in AXES for sym in (False, True)]
CASES += [(1, axis, False) for axis in AXES]
EVERY = pytest.mark.parametrize(("bits", "axis", "symmetric"), CASES)
PROPERTY = settings(max_examples=15, deadline=None)


def codec(bits: int, axis: str, symmetric: bool) -> Affine:
    """Groups of 8."""
    return Affine(bits=bits, axis=axis, group=GROUP, symmetric=symmetric)


@functools.partial(jax.jit, static_argnames="codec")
def encode(codec: Affine, x, live) -> AffineArray:
    """Codes of `x [*lead, S, D]`; an affine codec does not look at positions."""
    encoded = codec.encode(x, live, jnp.zeros(live.shape, jnp.int32), ROPE)
    assert isinstance(encoded, AffineArray)
    return encoded


def decode(encoded: AffineArray) -> np.ndarray:
    """What it stands for."""
    positions = jnp.zeros(encoded.codes.shape[:-1], jnp.int32)
    return np.asarray(encoded.decode(positions, ROPE))


def encoded_and_back(codec: Affine, x: np.ndarray, live=None):
    """The encoded array, and its float64 read-back."""
    live = np.ones(x.shape[:-1], bool) if live is None else live
    encoded = encode(codec, jnp.asarray(x, jnp.float32), jnp.asarray(live))
    return encoded, decode(encoded).astype(float)


def spread(encoded: AffineArray, side) -> np.ndarray:
    """Scale or zero of every element."""
    axis = -2 if encoded.axis == "channel" else -1
    return np.repeat(np.asarray(numbers(side), float), encoded.group, axis=axis)


def reach(encoded: AffineArray, x: np.ndarray) -> np.ndarray:
    """Error that each element may have: half a step.

    The two levels of 1 bit lie inside of a group's range: beyond them an element may be
    as far off as it lies outside.
    """
    step = spread(encoded, encoded.scale)
    half = step * 0.5 * (1 + 1e-5)
    if encoded.bits > 1:
        return half
    low = spread(encoded, encoded.zero)
    outside = np.maximum(low - x, x - low - step)
    return np.maximum(half, outside * (1 + 1e-5))


def normal(seed: int, level: float = 1.0, offset: float = 0.5) -> np.ndarray:
    """Random `[B, K, S, D]`, with an outlier channel as keys have."""
    x = np.random.default_rng(seed).normal(size=(B, K, S, D)) + offset
    x[..., 3] *= 20
    return (level * x).astype(np.float32)


def reference_scales(x: np.ndarray, bits: int, axis: str) -> np.ndarray:
    """Exact steps of every element's group."""
    shape = (B, K, S // GROUP, GROUP, D)
    along = 3
    if axis == "token":
        shape, along = (B, K, S, D // GROUP, GROUP), 4
    groups = x.astype(float).reshape(shape)
    steps = groups.max(along, keepdims=True) - groups.min(along, keepdims=True)
    return np.broadcast_to(steps / (2**bits - 1), groups.shape).reshape(x.shape)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_codes_are_those_of_kivi(bits, axis):
    x = normal(bits)
    encoded, ours = encoded_and_back(codec(bits, axis, False), x)
    read = reference.kivi_keys if axis == "channel" else reference.kivi_values
    theirs = np.stack([read(row, bits=bits, group=GROUP) for row in x])
    step = spread(encoded, encoded.scale)
    exact = reference_scales(x, bits, axis)
    # Scale and zero are rounded outwards to float16, which has 11 bits.
    zero = np.abs(spread(encoded, encoded.zero))
    slack = exact * 2.0**-9 + zero * 2.0**-9 / (2**bits - 1)
    assert (step >= exact).all() and (step <= exact + slack).all()
    assert (np.abs(ours - x) <= step * 0.5 * (1 + 1e-5)).all()
    # Half a step of each, so a value in between may go either way.
    assert (np.abs(ours - theirs) <= step * 1.5).all()
    assert (np.abs(ours - theirs) <= step * 0.25).mean() > (0.9 if bits < 8 else 0.5)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("seed", range(3))
def test_one_bit_is_that_of_the_reference(axis, seed):
    x = normal(seed)
    encoded, ours = encoded_and_back(codec(1, axis, False), x)
    theirs = np.stack([reference.one_bit(row, axis=axis, group=GROUP) for row in x])
    assert encoded.codes.shape == (B, K, S, D // 8)
    zero, scale = (spread(encoded, side) for side in (encoded.zero, encoded.scale))
    # Levels are rounded outwards to float16, which has 11 bits; so is their middle.
    slack = (np.abs(zero) + scale) * 2.0**-9
    between = np.abs(x - zero - scale / 2) <= slack
    assert ((np.abs(ours - theirs) <= slack) | between).all()
    assert between.mean() < 0.01


@pytest.mark.parametrize("axis", AXES)
@PROPERTY
@given(seed=st.integers(0, 1000), offset=st.sampled_from([0.0, 3.0]))
def test_one_bit_is_nearer_than_the_ends_of_the_range(axis, seed, offset):
    """By squares in every group; on the whole several times."""
    x = normal(seed, offset=offset)
    _, ours = encoded_and_back(codec(1, axis, False), x)
    read = reference.kivi_keys if axis == "channel" else reference.kivi_values
    ends = np.stack([read(row, bits=1, group=GROUP) for row in x])
    shape = (B, K, S // GROUP, GROUP, D) if axis == "channel" else (B, K, S, -1, GROUP)
    along = 3 if axis == "channel" else 4
    errors = [((back - x).reshape(shape) ** 2).sum(along) for back in (ours, ends)]
    size = (x.reshape(shape) ** 2).sum(along)
    assert (errors[0] <= errors[1] + size * 2.0**-16).all()
    assert errors[0].sum() < errors[1].sum() / 2


def test_int8_is_that_of_the_reference():
    x = normal(0)
    whole = Affine(bits=8, axis="token", group=None, symmetric=True)
    encoded, ours = encoded_and_back(whole, x)
    codes = np.asarray(encoded.codes).astype(int) - 127
    for row in range(B):
        want, scales, back = reference.int8_per_token(x[row])
        step = np.asarray(numbers(encoded.scale), float)[row]
        assert (step[..., 0] >= scales).all()
        assert (step[..., 0] <= scales * (1 + 2.0**-9)).all()
        assert np.abs(codes[row] - want).max() <= 1
        assert np.abs(codes[row]).max() <= 127
        assert (np.abs(ours[row] - x[row]) <= step * 0.5 * (1 + 1e-5)).all()
        assert (np.abs(ours[row] - back) <= step).all()


@EVERY
@PROPERTY
@given(
    x=hnp.arrays(np.float32, (1, 1, 8, D), elements=st.floats(-1.0, 1.0, width=32)),
    exponent=st.integers(-16, 15),
    offset=st.sampled_from([0.0, 0.0, 1.0, -3.0]),
)
def test_error_is_within_half_a_step(bits, axis, symmetric, x, exponent, offset):
    x = ((x + np.float32(offset)) * np.float32(2.0**exponent)).astype(np.float32)
    x = np.clip(x, -HALF_MAX / 2, HALF_MAX / 2)
    encoded, back = encoded_and_back(codec(bits, axis, symmetric), x)
    # float32 arithmetic on numbers as large as the group's.
    rounding = np.abs(x).max() * 2.0**-21
    assert (np.abs(back - x) <= reach(encoded, x) + rounding).all()


@EVERY
@pytest.mark.parametrize("value", [0.0, 1.0, -0.7, 1000.0, 3e-6])
def test_constant_groups(bits, axis, symmetric, value):
    x = np.full((1, 1, 8, D), value, np.float32)
    encoded, back = encoded_and_back(codec(bits, axis, symmetric), x)
    step = spread(encoded, encoded.scale)
    assert (np.abs(back - x) <= step * 0.5 * (1 + 1e-5)).all()
    # Half precision is all that a constant costs; steps are multiples of 2^-24.
    assert np.abs(back - x).max() <= abs(value) * 2.0**-9 + 2 ** (bits - 24)


@EVERY
@pytest.mark.parametrize("value", [7e4, 1e6, 3e38])
def test_values_beyond_the_scales_saturate(bits, axis, symmetric, value):
    """Scales and zeros are float16; what they cannot reach is cut off, never NaN."""
    x = normal(1)[:1, :1]
    x[..., 5, 5], x[..., 6, 6] = value, -value
    encoded, back = encoded_and_back(codec(bits, axis, symmetric), x)
    assert np.isfinite(back).all()
    assert np.isfinite(np.asarray(numbers(encoded.scale), float)).all()
    assert back[..., 5, 5] > 0 > back[..., 6, 6]


@EVERY
@PROPERTY
@given(seed=st.integers(0, 1000), level=st.sampled_from([1e-2, 1.0, 100.0]))
def test_encoding_twice_changes_little(bits, axis, symmetric, seed, level):
    one, first = encoded_and_back(codec(bits, axis, symmetric), normal(seed, level))
    two, second = encoded_and_back(codec(bits, axis, symmetric), first)
    step = spread(two, two.scale)
    assert (np.abs(second - first) <= step * 0.5 * (1 + 1e-5)).all()
    if symmetric:
        np.testing.assert_array_equal(one.codes, two.codes)


@EVERY
@PROPERTY
@given(seed=st.integers(0, 1000), holes=st.integers(0, 2**S - 1))
def test_dead_slots_are_never_read(bits, axis, symmetric, seed, holes):
    live = np.array([holes >> i & 1 for i in range(S)], bool)
    live = np.broadcast_to(live, (B, K, S))
    x = normal(seed)
    clean = np.where(live[..., None], x, 0)
    dirty = np.where(live[..., None], x, np.nan)
    given_codec = codec(bits, axis, symmetric)
    one, back = encoded_and_back(given_codec, clean, live)
    two, _ = encoded_and_back(given_codec, dirty, live)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.isfinite(back).all()
    inside = np.broadcast_to(live[..., None], x.shape)
    most = reach(one, x) + np.abs(x) * 2.0**-22  # float32 arithmetic
    assert (np.abs(back - x) <= most)[inside].all()


@EVERY
@PROPERTY
@given(
    seed=st.integers(0, 1000),
    starts=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    rows=st.tuples(st.booleans(), st.booleans()),
)
def test_a_later_block_changes_no_old_code(bits, axis, symmetric, seed, starts, rows):
    given_codec = codec(bits, axis, symmetric)
    old, _ = encoded_and_back(given_codec, normal(seed))
    later = normal(seed + 1, level=50.0)[:, :, :GROUP]
    block, _ = encoded_and_back(given_codec, later)
    at = np.array(starts) * GROUP
    after = jax.jit(AffineArray.put)(old, block, jnp.asarray(at), jnp.asarray(rows))
    leaves = (jax.tree.leaves(tree) for tree in (old, block, after))
    for before, new, now in zip(*leaves, strict=True):
        unit = S // before.shape[-2]
        want = np.array(before)
        for row in range(B):
            if rows[row]:
                first = at[row] // unit
                want[row, :, first : first + new.shape[-2]] = np.asarray(new)[row]
        assert want.dtype == now.dtype
        assert want.tobytes() == np.asarray(now).tobytes()


def spectrum_keys(seed: int) -> np.ndarray:
    """Post-RoPE keys `[1, K, S, D]` whose pre-RoPE spectrum falls by a third a step."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(S, S)))
    right, _ = np.linalg.qr(rng.normal(size=(K * D, K * D)))
    wide = 10 * (left * 0.67 ** np.arange(S)) @ right[:S]
    plain = wide.reshape(S, K, D).transpose(1, 0, 2)
    return reference.rotate(plain, np.arange(S), ROPE.frequencies())[None]


AT = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (1, K, S))


def low_rank(codec: LowRank, keys: np.ndarray):
    """Encoded and decoded keys at positions `0 .. S - 1`."""
    x = jnp.asarray(keys, jnp.float32)
    encoded = codec.encode(x, jnp.ones(x.shape[:-1], bool), AT, ROPE)
    return encoded, np.asarray(encoded.decode(AT, ROPE))


@pytest.mark.parametrize("rank", [1, 4, 9, 16])
def test_low_rank_is_the_truncated_svd(rank):
    keys = spectrum_keys(0)
    encoded, ours = low_rank(LowRank(energy=1.0, keep=rank / (K * D)), keys)
    theirs = reference.low_rank_keys(keys[0], inv_freq=ROPE.frequencies(), rank=rank)
    assert encoded.rank == rank
    lost, least = (((x - keys[0]) ** 2).sum() for x in (ours[0], theirs))
    assert lost <= least + np.finfo(np.float32).eps * (keys**2).sum()
    if rank <= 9:  # beyond, a Gram matrix in float32 turns near components a little
        np.testing.assert_allclose(ours[0], theirs, atol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.999])
def test_low_rank_keeps_the_energy_it_promises(energy):
    keys = spectrum_keys(1)
    encoded, ours = low_rank(LowRank(energy=energy, keep=1.0), keys)
    share = (0.67**2) ** np.arange(S)
    rank = int((np.cumsum(share) / share.sum() < energy).sum()) + 1
    used = jnp.any(encoded.basis != 0, axis=(-3, -1))
    assert int(jnp.sum(used, axis=-1).max()) == rank
    settled = encoded.settled()
    assert settled.rank == min(-(-rank // RANKS) * RANKS, encoded.rank)
    np.testing.assert_array_equal(ours, np.asarray(settled.decode(AT, ROPE)))
    theirs = reference.low_rank_keys(keys[0], inv_freq=ROPE.frequencies(), rank=rank)
    np.testing.assert_allclose(ours[0], theirs, atol=1e-5)
    lost = ((ours - keys) ** 2).sum() / (keys**2).sum()
    assert lost <= (1 - energy) * (1 + 1e-4)
