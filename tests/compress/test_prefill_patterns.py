"""Sparse patterns of prefill against masks written out in NumPy."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.dense import causal_attention
from kvjax.pallas_kernels.partial import Partial
from kvjax.prefills import PREFILLS, AbstractPattern, Dense
from kvjax.prefills.chosen import own
from kvjax.prefills.ranking import fewest, highest
from kvjax.types import EMPTY, LayerInputs
from tests.compress.samples import Sample, draw, layer_spec
from tests.reference import prefilling

LENGTHS, WIDTH = (150, 97, 41, 150), 160
SPECS = {
    "full": layer_spec(4, 2, 16),
    "window": layer_spec(6, 2, 16, window=70),
    "softcap": layer_spec(4, 4, 16, softcap=2.0),
}
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def fixed(mask: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A mask that does not look at what it masks."""

    def of(q, k, *, window=None, **how):
        (heads, n, _), at = q.shape, np.indices((q.shape[1],) * 2)
        near = at[0] - at[1] < (window or n)
        return np.repeat(mask(n, **how) & near, heads, axis=0)

    return of


PATTERNS: dict[str, tuple[str, dict[str, Any], Callable[..., np.ndarray]]] = {
    "a_shape": (
        "a_shape",
        {"first": 5, "local": 19},
        fixed(prefilling.a_shape_mask),
    ),
    "tri_shape": (
        "tri_shape",
        {"first": 9, "local": 24, "last": 20},
        fixed(prefilling.tri_shape_mask),
    ),
    "block_topk": ("block_topk", {"blocks": 3}, prefilling.block_topk_mask),
    "xattention": (
        "xattention",
        {"threshold": 0.6, "stride": 4},
        prefilling.xattention_mask,
    ),
    "flex_lines": (
        "flex_prefill",
        {"gamma": 0.5, "tau": 0.0, "least": 8},
        prefilling.flex_prefill_mask,
    ),
    "flex_most": (
        "flex_prefill",
        {"gamma": 0.9, "tau": 0.0, "least": 8, "most": 30},
        prefilling.flex_prefill_mask,
    ),
    "flex_means": (
        "flex_prefill",
        {"gamma": 0.43, "tau": 1.0, "least": 16},
        prefilling.flex_prefill_mask,
    ),
}
EVERY = pytest.mark.parametrize("name", PATTERNS)
SPARSE: dict[str, Callable[..., AbstractPattern]] = {
    name: cls for name, cls in PREFILLS.items() if issubclass(cls, AbstractPattern)
}


def made(name: str, block: int = 16, dense_below: int = 0) -> AbstractPattern:
    """A pattern of these sizes."""
    kind, fields, _ = PATTERNS[name]
    given = fields | {"block": block, "dense_below": dense_below}
    return SPARSE[kind](**given)


def peaked(seed: int, spec, lengths=LENGTHS, width=WIDTH) -> Sample:
    """Tokens among which some are asked for more than others, padding NaN."""
    sample = draw(seed, spec, lengths, width)
    rng = np.random.default_rng(seed)
    loud = rng.choice([0.6, 3.0], p=[0.9, 0.1], size=(1, spec.num_kv_heads, width, 1))
    live = (sample.inputs.positions >= 0)[:, None, :, None]
    k = jnp.where(live, sample.inputs.k * loud, jnp.nan)
    q, v = (jnp.where(live, x, jnp.nan) for x in (sample.inputs.q, sample.inputs.v))
    inputs = dataclasses.replace(sample.inputs, q=q, k=k.astype(jnp.float32), v=v)
    return Sample(inputs=inputs, lengths=sample.lengths)


@functools.partial(jax.jit, static_argnums=(0, 3))
def attend(prefill, inputs, lengths, mass=False, past=None):
    return prefill.attend(inputs, lengths, mass, past)


def weights(sample: Sample, row: int, mask: np.ndarray) -> np.ndarray:
    """Softmax weights `[H, n, n]` of a row under a mask."""
    (q, k, _), spec = sample.row(row), sample.inputs.spec
    k = np.repeat(k, spec.groups, axis=0)
    logits = np.einsum("hid,hjd->hij", q, k) * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    logits = np.where(mask, logits, -np.inf)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def wanted(sample: Sample, row: int, name: str, block: int) -> np.ndarray:
    """The reference's mask of a row."""
    (q, k, _), (kind, fields, mask) = sample.row(row), PATTERNS[name]
    spec, fields = sample.inputs.spec, {**fields, "block": block}
    if kind == "flex_prefill":  # which computes weights of single queries
        fields["softcap"] = spec.softcap
    return mask(q, k, window=spec.window, **fields)


@pytest.mark.sweep(2, 7)
@pytest.mark.parametrize("spec", SPECS)
@EVERY
def test_output_is_that_of_the_mask(name, spec):
    """Of ragged rows, of which padding holds NaN; with the mass of columns, too."""
    sample, block = peaked(3, SPECS[spec]), 16
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    out, none = attend(made(name, block), sample.inputs, lengths)
    masked, mass = attend(made(name, block), sample.inputs, lengths, True)
    assert none is None and mass is not None
    for row, n in enumerate(sample.lengths[:3]):
        mask = wanted(sample, row, name, block)
        if row == 0:  # it is neither all nor nothing
            share = mask.sum() / np.tril(np.ones_like(mask)).sum()
            assert 0.1 < share < 0.9, share
        weight = weights(sample, row, mask)
        v = np.repeat(sample.row(row)[2], SPECS[spec].groups, axis=0)
        close(out[row, :, :n], weight @ v)
        close(masked[row, :, :n], weight @ v)
        close(mass[row, :, :n], weight.sum(1))


@pytest.mark.sweep(1, 3)
@EVERY
def test_a_row_is_what_it_is_alone(name):
    sample, row = peaked(4, SPECS["full"]), 1
    n, prefill = sample.lengths[row], made(name)
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    both = attend(prefill, sample.inputs, lengths)[0]
    given, at = sample.inputs, slice(row, row + 1)
    cut = {name: getattr(given, name)[at, :, :n] for name in ("q", "k", "v")}
    one = dataclasses.replace(given, positions=given.positions[at, :n], **cut)
    alone = attend(prefill, one, lengths[row : row + 1])[0]
    close(both[row, :, :n], alone[0])


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("name", SPARSE)
def test_a_prefix_is_seen_in_full(name):
    """By absolute positions that do not begin at 0, nor at a block's start."""
    spec, before, tokens, block = SPECS["full"], 37, 96, 16
    whole = draw(5, spec, (before + tokens,)).inputs
    prefill = SPARSE[name](block=block, dense_below=0, **small(name))
    inputs = behind(whole, before)
    past = causal_attention(
        inputs.q,
        whole.k[:, :, :before],
        whole.v[:, :, :before],
        inputs.positions,
        whole.positions[:, :before],
        scale=spec.scale,
    )
    lengths = jnp.asarray([tokens], jnp.int32)
    out, _ = attend(prefill, inputs, lengths, False, past)
    masked, mass = attend(prefill, inputs, lengths, True, past)
    close(out, masked)
    # What the prompt sees of itself is what it sees without the prefix.
    mask = seen_by_hand(prefill, own(inputs), lengths)
    full = np.concatenate([np.ones((4, tokens, before), bool), mask], axis=2)
    sample = Sample(inputs=whole, lengths=np.array([before + tokens]))
    padded = np.zeros((4, before + tokens, before + tokens), bool)
    padded[:, before:], padded[:, :before, 0] = full, True
    weight = weights(sample, 0, padded)[:, before:]
    close(out[0], weight @ np.repeat(sample.row(0)[2], spec.groups, axis=0))
    close(mass[0], weight[..., before:].sum(1))


def small(name: str) -> dict[str, Any]:
    """Sizes for a hundred tokens."""
    if name == "vertical_slash":
        sizes = {"vertical": 9, "slash": 3, "last_q": 8, "first": 2, "local": 1}
        return sizes
    if name == "by_head":
        others = ("vertical_slash", "a_shape", "xattention")
        patterns = [SPARSE[one](block=16, **small(one)) for one in others]
        return {"patterns": (*patterns, Dense()), "table": ((0, 1, 2, 3),)}
    found = (fields for kind, fields, _ in PATTERNS.values() if kind == name)
    return next(found)


def behind(whole: LayerInputs, before: int) -> LayerInputs:
    """The tokens behind the first ones, at their own positions."""
    cut = {name: getattr(whole, name)[:, :, before:] for name in ("q", "k", "v")}
    return dataclasses.replace(whole, positions=whole.positions[:, before:], **cut)


def seen_by_hand(prefill, inputs, lengths) -> np.ndarray:
    """Pairs of tokens of one row that a choice contains, `[H, n, n]`."""
    chosen = jax.jit(prefill.choose)(inputs, lengths)
    n, block = inputs.positions.shape[1], prefill.block
    at, key = np.indices((n, n))
    mask = np.zeros((inputs.q.shape[1], n, n), bool)
    if chosen.blocks is not None:
        mask |= np.asarray(chosen.blocks)[0][:, at // block, key // block]
    if chosen.diagonals is not None:
        offset = np.maximum(at // block - key // block, 0)
        mask |= np.asarray(chosen.diagonals)[0][:, offset]
    if chosen.columns is not None:
        mask |= np.asarray(chosen.columns)[0][:, key]
    return mask & (key <= at)


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("name", SPARSE)
def test_short_rows_are_read_densely(name):
    """By their own length; the rows beside them are not."""
    sample, edge = peaked(6, SPECS["full"]), 98
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    fields = small(name) | {"block": 16}
    switched = SPARSE[name](dense_below=edge, **fields)
    sparse = SPARSE[name](dense_below=0, **fields)
    dense = PREFILLS["dense"]()
    for mass in (False, True):
        found = attend(switched, sample.inputs, lengths, mass)
        long = attend(sparse, sample.inputs, lengths, mass)
        short = attend(dense, sample.inputs, lengths, mass)
        for ours, far, near in zip(found, long, short, strict=True):
            if ours is None:
                continue
            for row, n in enumerate(sample.lengths):
                want = near if n < edge else far
                close(ours[row, :, :n], want[row, :, :n])
            assert np.abs(far - near)[0, :, : LENGTHS[0]].max() > 1e-2
    cut = peaked(6, SPECS["full"], (97, 41), 97)
    lengths = jnp.asarray(cut.lengths, jnp.int32)
    sorts = [
        "sort" in str(jax.make_jaxpr(x.attend, static_argnums=2)(*given))
        for given in [(cut.inputs, lengths, False)]
        for x in (switched, sparse)
    ]
    assert sorts == [False, True]  # known from the width: nothing is chosen


@pytest.mark.parametrize("name", ["xattention", "vertical_slash"])
def test_the_switch_heeds_a_prefix(name):
    spec = SPECS["full"]
    sample = peaked(7, spec, (130, 60), 130)
    lengths = jnp.asarray(sample.lengths, jnp.int32)
    rng = np.random.default_rng(0)
    past = Partial(
        jnp.asarray(rng.normal(size=sample.inputs.q.shape), jnp.float32),
        jnp.asarray(rng.normal(size=sample.inputs.q.shape[:3]) + 3, jnp.float32),
    )
    fields = small(name) | {"block": 16}
    ours = attend(
        SPARSE[name](dense_below=70, **fields), sample.inputs, lengths, False, past
    )
    near = attend(PREFILLS["dense"](), sample.inputs, lengths, False, past)
    far = attend(
        SPARSE[name](dense_below=0, **fields), sample.inputs, lengths, False, past
    )
    close(ours[0][0], far[0][0])
    close(ours[0][1, :, :60], near[0][1, :, :60])


@pytest.mark.sweep(1, 3)
@EVERY
def test_gradients_are_those_of_the_mask(name):
    """Padding, which holds NaN, gets and gives none."""
    sample = peaked(8, SPECS["full"], (100, 60), 104)
    lengths, prefill = jnp.asarray(sample.lengths, jnp.int32), made(name)
    live = (sample.inputs.positions >= 0)[:, None, :, None]
    turn = jnp.asarray(np.random.default_rng(9).normal(size=sample.inputs.q.shape))

    def total(arrays, mass: bool):
        inputs = dataclasses.replace(sample.inputs, **arrays)
        out = prefill.attend(inputs, lengths, mass)[0]
        return jnp.sum(jnp.where(live, out * turn, 0))

    arrays = {name: getattr(sample.inputs, name) for name in ("q", "k", "v")}
    slope = jax.jit(jax.grad(total), static_argnums=1)
    ours, masked = slope(arrays, False), slope(arrays, True)
    for side in arrays:
        close(ours[side], masked[side], atol=2e-4)
        assert not np.any(np.where(live, 0, ours[side]))
        assert np.any(ours[side])


def test_share_counts_blocks_and_columns():
    """Of the 55 pairs of blocks of 160 tokens and the 28 of 97."""
    sample = peaked(3, SPECS["full"])
    lengths, inputs = jnp.asarray(sample.lengths, jnp.int32), own(sample.inputs)

    @functools.partial(jax.jit, static_argnums=0)
    def shares(prefill):
        return prefill.choose(inputs, lengths).share(inputs)

    # 10 of the main diagonal, 9 and 8 beside it, the first column: 7 more.
    share = shares(made("a_shape"))
    np.testing.assert_allclose(share[0], 34 / 55, rtol=1e-6)
    np.testing.assert_allclose(share[1], (7 + 6 + 5 + 4) / 28, rtol=1e-6)
    slash = SPARSE["vertical_slash"](
        vertical=3, slash=1, last_q=8, first=3, local=1, block=16, dense_below=0
    )
    # A block's diagonal, and three columns in each of the 9 blocks below the first.
    want = (10 + 9 * 3 / 16) / 55
    np.testing.assert_allclose(shares(slash)[0], want, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_fewest_are_as_few_as_reach_it(seed):
    rng = np.random.default_rng(seed)
    mass = rng.exponential(size=(5, 40)) ** 3
    mass[:, ::7] = 0
    total = mass.sum(-1, keepdims=True)
    for share in (-0.1, 0.0, 0.3, 0.9, 2.0):
        wanted = jnp.asarray(share * total, jnp.float32)
        kept = np.asarray(fewest(jnp.asarray(mass, jnp.float32), wanted))
        for row in range(5):
            want = np.zeros(40, bool)
            want[prefilling.reaching(mass[row], share * total[row, 0])] = True
            np.testing.assert_array_equal(kept[row], want & (mass[row] > 0))


def test_equal_ones_are_kept_together():
    kept = fewest(jnp.asarray([[1.0, 3, 1, 1, 0]]), jnp.asarray([[3.5]]))
    np.testing.assert_array_equal(kept, [[True, True, True, True, False]])


def test_highest_takes_counts_of_data():
    scores = jnp.asarray([[3.0, 1, 2, -jnp.inf], [1.0, 1, 1, 1]])
    kept = highest(scores, jnp.asarray([[4], [2]]))
    np.testing.assert_array_equal(kept, [[1, 1, 1, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("xattention", {"stride": 24}, "`stride` must divide `block`=128; got 24"),
        ("xattention", {"threshold": 0.0}, r"threshold` must be a number in \(0, 1"),
        ("flex_prefill", {"tau": -0.1}, "tau` must be"),
        ("a_shape", {"local": 0}, "local` must be an integer >= 1"),
        ("block_topk", {"blocks": 0}, "blocks` must be an integer >= 1"),
        ("tri_shape", {"dense_below": -1}, "dense_below` must be an integer >= 0"),
    ],
)
def test_bad_input(name, fields, message):
    with pytest.raises(ValueError, match=message):
        SPARSE[name](**fields)


def test_padding_is_no_position():
    sample = peaked(3, SPECS["full"])
    inputs = own(sample.inputs)
    assert not np.isnan(np.asarray(inputs.k)).any()
    for row, n in enumerate(sample.lengths):
        np.testing.assert_array_equal(inputs.positions[row, :n], np.arange(n))
        assert (np.asarray(inputs.positions)[row, n:] == EMPTY).all()
