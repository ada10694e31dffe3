"""What `column_stats` and `block_score` refuse and promise beyond parity."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.block_score import block_score
from kvjax.pallas_kernels.block_score import tpu as block_score_tpu
from kvjax.pallas_kernels.column_stats import column_stats
from kvjax.pallas_kernels.column_stats import tpu as column_stats_tpu
from kvjax.pallas_kernels.column_stats.args import ColumnArgs

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


def make_room(monkeypatch, module, fits) -> None:
    """Less VMEM, until `fits` is true of what a kernel would keep there."""
    for extra in range(0, 8 << 20, 1 << 13):
        monkeypatch.setattr(module, "VMEM", module.SPARE + extra)
        with contextlib.suppress(NotImplementedError):
            if fits():
                return
    raise AssertionError("no such size")


def draw(queries: int, keys: int, d: int):
    rng = np.random.default_rng(1)
    shapes = (1, 4, queries, d), (1, 2, keys, d)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def close(ours, theirs) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize(("queries", "kept"), [(256, (1, True)), (100, (0, False))])
def test_column_stats_of_more_keys_than_fit(monkeypatch, queries, kept):
    """Some keys pass through VMEM again and again, and results too if need be."""
    tiles = {"block_q": 128, "block_k": 128}
    q, k = draw(queries, 384, 64)
    at = jnp.arange(384, dtype=jnp.int32)[None]
    args, how = (q, k, at[:, 384 - queries :], at), {"scale": 0.1, "slash": True}
    bound = ColumnArgs(
        q=q,
        keys=k,
        q_positions=args[2],
        k_positions=at,
        weights=None,
        lse=None,
        scale=0.1,
        window=None,
        softcap=None,
        slash=True,
    )

    def fits():
        plan = column_stats_tpu.make_plan(bound, tiles)
        return (plan.resident, plan.whole) == kept

    make_room(monkeypatch, column_stats_tpu, fits)
    want = column_stats(*args, **how, backend="reference")
    close(column_stats(*args, **how, backend="tpu", tiles=tiles, interpret=True), want)


def test_column_stats_beyond_the_memory_of_a_core(monkeypatch):
    monkeypatch.setattr(column_stats_tpu, "VMEM", column_stats_tpu.SPARE + (1 << 18))
    with pytest.raises(NotImplementedError, match="column_stats: sums of 512 queries"):
        q, k = draw(512, 2048, 64)
        at = jnp.arange(2048, dtype=jnp.int32)[None]
        column_stats(q, k, at[:, -512:], at, scale=0.1, backend="tpu")


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize("stride", [4, 64])
def test_block_score_of_more_keys_than_fit(monkeypatch, stride):
    """Also with groups that XLA puts in a row, the kernel would not."""
    how = {"block_q": 64, "block_k": 64, "stride": stride, "scale": 0.1}
    tiles = {"rows": 8, "columns": 128}
    args = draw(1024, 512 * stride if stride == 4 else 16384, 128)
    seen = []
    resident = block_score_tpu._resident

    def some(*sizes):
        seen.append(min(1, resident(*sizes)))
        return seen[-1]

    monkeypatch.setattr(block_score_tpu, "_resident", some)
    want = block_score(*args, **how, backend="xla")
    got = block_score(*args, **how, backend="tpu", tiles=tiles, interpret=True)
    assert seen == [1]
    close(got, want)
