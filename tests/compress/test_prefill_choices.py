"""How patterns rank, when they are dense, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.partial import Partial
from kvjax.prefills import PREFILLS
from kvjax.prefills.ranking import fewest, highest
from tests.compress.patterns import LENGTHS, SPARSE, SPECS, attend, peaked, small
from tests.reference import prefilling

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


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
    for mass in (False, True) if name == "xattention" else (False,):
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
