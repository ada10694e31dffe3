"""`held_attention` against all pairs at once, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels import dispatch, held_blocks
from kvjax.pallas_kernels import held as held_file
from kvjax.pallas_kernels.dense import visible
from kvjax.pallas_kernels.held import Earlier, Stored, held_attention
from kvjax.pallas_kernels.partial import cap

B, H, K, D, T = 3, 4, 2, 8, 70
LENGTHS, POINTS = (T, T - 7, 9), (20, 5, 9)
SCALE = 0.4


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays that have a gradient, and the rest."""

    arrays: tuple[jax.Array, ...]
    positions: jax.Array
    held: Earlier
    slope: jax.Array


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    index = jnp.arange(T)
    q, slope = normal(B, H, T, D), normal(B, H, T, D)
    k, v, keys, values = (normal(B, K, T, D) for _ in range(4))
    stored = Stored(
        keys=keys,
        values=values,
        slot=jnp.asarray(rng.integers(0, 30, (B, K, T)), jnp.int32),
        edge=jnp.broadcast_to(index // 2, (B, T)).astype(jnp.int32),
    )
    held = Earlier(
        behind=index >= jnp.asarray(POINTS)[:, None],
        kept=jnp.asarray(rng.random((B, K, T)) < 0.3),
        stored=stored,
        soft=jnp.zeros((B, K, T)),
    )
    positions = jnp.where(index < jnp.asarray(LENGTHS)[:, None], index, -1)
    return Case((q, k, v, keys, values, jnp.zeros((B, K, T))), positions, held, slope)


def assembled(case: Case, kind: str, keys, values, soft) -> Earlier | None:
    """What `kind` has of the case, with arrays that may be traced."""
    if kind == "causal":
        return None
    assert case.held.stored is not None
    stored = dataclasses.replace(case.held.stored, keys=keys, values=values)
    return dataclasses.replace(
        case.held,
        stored=stored if kind in ("stored", "both") else None,
        soft=soft if kind in ("choice", "both") else None,
    )


def all_pairs(q, k, v, positions, held, *, scale, window, softcap):
    """Every pair of a query and a key at once; gradients by JAX."""
    groups = H // K

    def by_query(x):
        return jnp.repeat(x, groups, axis=1)

    stop = jax.lax.stop_gradient
    seen = visible(positions, positions, window)[:, None]
    logits = jnp.einsum("bhtd,bhsd->bhts", q, by_query(k)) * scale
    values = by_query(v)[:, :, None].repeat(T, axis=2)
    chosen = jnp.zeros_like(seen)
    if held is not None:
        chosen = (held.behind[:, :, None] & ~held.behind[:, None, :])[:, None] & seen
        seen = seen & (by_query(held.kept)[:, :, None] | ~chosen)
    if held is not None and held.stored is not None:
        at = by_query(held.stored.slot)[:, :, None] < held.stored.edge[:, None, :, None]
        other = jnp.einsum("bhtd,bhsd->bhts", q, by_query(held.stored.keys)) * scale
        logits = jnp.where(at & seen, other, logits)
        stored = by_query(held.stored.values)[:, :, None]
        values = jnp.where((at & seen)[..., None], stored, values)
    logits = cap(logits, softcap)
    masked = jnp.where(seen, logits, -1e30)
    weight = jnp.where(seen, jax.nn.softmax(masked), 0.0)
    out = jnp.einsum("bhts,bhtsd->bhtd", weight, values)
    if held is None or held.soft is None:
        return out
    gain = jax.nn.sigmoid(logits - jax.nn.logsumexp(masked, axis=-1, keepdims=True))
    share = stop(jnp.where(chosen, jnp.where(seen, weight, gain), 0.0))
    share = share * by_query(held.soft)[:, :, None]
    moved = stop(values - out[:, :, :, None])
    return out + jnp.einsum("bhts,bhtsd->bhtd", share, moved)


@pytest.mark.sweep(4, 12)
@pytest.mark.parametrize(
    ("block", "devices"),
    [(1 << 30, 1), (1 << 10, 1), (1 << 9, 2)],
    ids=["rows", "queries", "spread"],
)
@pytest.mark.parametrize(
    "how",
    [
        {"window": None, "softcap": None},
        {"window": 6, "softcap": None},
        {"window": None, "softcap": 2.0},
    ],
    ids=["full", "window", "softcap"],
)
@pytest.mark.parametrize("kind", ["causal", "held", "choice", "stored", "both"])
def test_equals_all_pairs(kind, how, block, devices, case, monkeypatch):
    monkeypatch.setattr(held_blocks, "CPU_BLOCK", block)
    monkeypatch.setattr(dispatch, "partitions", lambda: devices)
    monkeypatch.setattr(held_file, "PREFIX", 16)

    def loss(fn):
        def weighed(arrays):
            q, k, v, keys, values, soft = arrays
            held = assembled(case, kind, keys, values, soft)
            out = fn(q, k, v, case.positions, held, scale=SCALE, **how)
            live = (case.positions >= 0)[:, None, :, None]
            return jnp.sum(jnp.where(live, case.slope * out, 0.0)), out

        return jax.jit(jax.value_and_grad(weighed, has_aux=True))(case.arrays)

    (_, got), slopes = loss(held_attention)
    (_, want), wanted = loss(all_pairs)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    for one, other in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    moved = [bool(np.abs(slope).max() > 1e-3) for slope in slopes]
    stored, choice = kind in ("stored", "both"), kind in ("choice", "both")
    assert moved == [True] * 3 + [stored] * 2 + [choice]


def test_padding_is_absent(case):
    """NaN in padding reaches nothing; its own rows and slopes are zero."""
    live = (case.positions >= 0)[:, None, :, None]
    held = dataclasses.replace(case.held, stored=None)

    def attend(arrays):
        q, k, v = arrays
        return held_attention(q, k, v, case.positions, held, scale=SCALE)

    q, k, v, *_ = case.arrays
    clean = (q, k, v)
    dirty = tuple(jnp.where(live, x, jnp.nan) for x in clean)
    out = attend(dirty)
    np.testing.assert_array_equal(out, attend(clean))
    assert not np.asarray(jnp.where(live, 0.0, out)).any()
    slopes = jax.grad(lambda x: jnp.sum(attend(x) * jnp.where(live, case.slope, 0)))(
        dirty
    )
    for slope in slopes:
        assert np.isfinite(slope).all()
        assert not np.asarray(jnp.where(live, 0.0, slope)).any()
