"""What `column_stats` and `block_score` refuse and promise beyond parity."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.block_score import block_score
from kvjax.pallas_kernels.column_stats import column_stats

Q, K = jnp.zeros((1, 4, 32, 16)), jnp.zeros((1, 2, 32, 16))
AT = jnp.arange(32, dtype=jnp.int32)[None]
BLOCKS = {"block_q": 16, "block_k": 16, "stride": 8, "scale": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "`window`"),
        ({"softcap": -1.0}, "`softcap`"),
        ({"weights": jnp.ones((1, 4, 31))}, "`weights`"),
        ({"lse": jnp.ones((1, 4, 31))}, "`lse`"),
    ],
)
def test_bad_settings_of_column_stats(change, message):
    with pytest.raises(ValueError, match=message):
        column_stats(Q, K, AT, AT, scale=1.0, **change)


def test_bad_arrays_of_column_stats():
    with pytest.raises(ValueError, match="multiple of the KV heads"):
        column_stats(Q[:, :3], K, AT, AT, scale=1.0)
    with pytest.raises(ValueError, match="`k_positions`"):
        column_stats(Q, K, AT, AT[:, 1:], scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        column_stats(Q.astype(jnp.bfloat16), K, AT, AT, scale=1.0)


def test_each_query_gives_its_weight_once():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal(Q.shape), jnp.float32)
    k = jnp.asarray(rng.standard_normal(K.shape), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=Q.shape[:3]), jnp.float32)
    stats = column_stats(q, k, AT, AT, scale=0.5, weights=weights, slash=True)
    want = jnp.sum(weights, axis=-1)
    assert stats.slash is not None
    np.testing.assert_allclose(jnp.sum(stats.sum, -1), want, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(stats.slash, -1), want, rtol=1e-5)
    assert np.all(stats.max <= stats.sum + 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 20}, "`block_q` must divide the 32 tokens"),
        ({"stride": 5}, "`stride` must divide"),
        ({"mode": "max"}, "`mode` must be one of"),
    ],
)
def test_bad_settings_of_block_score(change, message):
    with pytest.raises(ValueError, match=message):
        block_score(Q, K, **(BLOCKS | change))


def test_causal_needs_the_keys_of_the_queries():
    with pytest.raises(ValueError, match="at least as many tokens"):
        block_score(Q, K[:, :, :16], **BLOCKS)


@pytest.mark.parametrize(("mode", "each"), [("mean", 1.0), ("antidiagonal", 2.0)])
def test_rows_of_block_score_sum_to_their_groups(mode, each):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal(Q.shape), jnp.float32)
    mass = block_score(q, K, **(BLOCKS | {"mode": mode}))
    np.testing.assert_allclose(jnp.sum(mass, -1), each, rtol=1e-5)
    assert not np.any(mass[..., 0, 1])
