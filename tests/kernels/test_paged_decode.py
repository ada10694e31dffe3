"""Properties and errors of `paged_decode`, `page_summary` and `page_score`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.page_score import page_score
from kvjax.pallas_kernels.page_summary import page_summary
from kvjax.pallas_kernels.paged_decode import paged_decode
from kvjax.pallas_kernels.paged_decode.cases import KIVI4, quantized
from kvjax.pallas_kernels.paged_decode.tpu import _refuse_copies
from kvjax.pallas_kernels.quantize_pack import dequantize

B, H, K, S, D, PAGE = 2, 4, 2, 96, 32, 16
C = S // PAGE
SCALE = D**-0.5
BACKENDS = pytest.mark.parametrize(
    "how",
    [
        {"backend": "reference"},
        {"backend": "xla"},
        {"backend": "tpu", "tiles": {"slots": 64}, "interpret": True},
    ],
    ids=lambda how: how["backend"],
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def cache(rng):
    """Queries, keys and values `[B, *, S, D]`, and all pages of each head."""
    q = jnp.asarray(rng.standard_normal((B, H, 1, D)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((B, K, S, D)), jnp.float32) for _ in "kv")
    pages = jnp.arange(B * K * C, dtype=jnp.int32).reshape(B, K, C)
    return q, k, v, pages, jnp.full((B, K), C, jnp.int32)


def pooled(x) -> jax.Array:
    return x.reshape(-1, PAGE, D)


def dense(q, k, v):
    k, v = (np.repeat(np.asarray(x, np.float64), H // K, axis=1) for x in (k, v))
    logits = np.asarray(q, np.float64) @ k.swapaxes(-1, -2) * SCALE
    weight = np.exp(logits)
    total = weight.sum(-1, keepdims=True)
    return weight / total @ v, np.log(total[..., 0])


@BACKENDS
def test_all_pages_are_dense_attention(how):
    q, k, v, pages, counts = cache(np.random.default_rng(0))
    part = paged_decode(q, pooled(k), pooled(v), pages, counts, scale=SCALE, **how)
    out, lse = dense(q, k, v)
    close(part.out, out)
    close(part.lse, lse)


@BACKENDS
def test_order_of_pages_does_not_matter(how):
    rng = np.random.default_rng(1)
    q, k, v, pages, counts = cache(rng)
    counts = jnp.asarray([[C, 3], [0, 1]], jnp.int32)
    turned = np.array(pages)
    for row in np.ndindex(B, K):
        turned[row][: counts[row]] = rng.permutation(turned[row][: counts[row]])
    args, other = (q, pooled(k), pooled(v)), jnp.asarray(turned)
    one = paged_decode(*args, pages, counts, scale=SCALE, **how)
    two = paged_decode(*args, other, counts, scale=SCALE, **how)
    for a, b in zip(one, two, strict=True):
        close(a, b)
    assert np.isneginf(one.lse[1, :2]).all() and not np.any(one.out[1, :2])


@BACKENDS
def test_bias_log_n_is_n_copies(how):
    q, k, v, pages, counts = cache(np.random.default_rng(2))
    args = (q, pooled(k), pooled(v))
    twice = jnp.concatenate([pages, pages[..., :2], pages[..., :2]], axis=-1)
    want = paged_decode(*args, twice, counts + 4, scale=SCALE, backend="reference")
    bias = jnp.zeros((B, K, S)).at[..., : 2 * PAGE].set(jnp.log(3.0))
    got = paged_decode(*args, pages, counts, bias=bias, scale=SCALE, **how)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_quantised_pages_are_their_values():
    rng = np.random.default_rng(3)
    q, _, _, pages, counts = cache(rng)
    k, v = (quantized(rng, (B * K * C, PAGE, D), **how) for how in KIVI4)
    plain = (dequantize(k), dequantize(v))
    ours = paged_decode(q, k, v, pages, counts, scale=SCALE, backend="reference")
    want = paged_decode(q, *plain, pages, counts, scale=SCALE, backend="reference")
    for a, b in zip(ours, want, strict=True):
        close(a, b)


def test_long_selections_go_in_chunks(monkeypatch):
    monkeypatch.setattr("kvjax.pallas_kernels.paged_decode.xla.CHUNK_SLOTS", 2 * PAGE)
    q, k, v, pages, _ = cache(np.random.default_rng(4))
    counts = jnp.asarray([[C, 5], [0, 1]], jnp.int32)
    args = (q, pooled(k), pooled(v), pages, counts)
    want = paged_decode(*args, scale=SCALE, backend="reference")
    got = jax.jit(functools.partial(paged_decode, scale=SCALE, backend="xla"))(*args)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_bound_is_above_every_product(backend, dtype):
    rng = np.random.default_rng(5)
    q, k, _, _, _ = cache(rng)
    q, k = q.astype(dtype), k.astype(dtype)
    live = jnp.asarray(rng.random((B, K, S)) < 0.7).at[0, 0, :PAGE].set(False)
    summary = page_summary(k, live, page=PAGE, backend=backend)
    score = page_score(
        q, summary.low, summary.high, mode="bound", group="max", backend=backend
    )
    grouped = np.asarray(q, np.float64).reshape(B, K, H // K, D)
    products = grouped @ np.asarray(k, np.float64).swapaxes(-1, -2)
    products = np.where(live[:, :, None], products, -np.inf).max(2)
    products = products.reshape(B, K, C, PAGE).max(-1)
    assert (np.asarray(score)[:, :, 0] >= products - 1e-4).all()
    assert not np.any(np.asarray(summary.low)[0, 0, 0])


def test_shares_sum_to_one():
    q, k, _, _, _ = cache(np.random.default_rng(6))
    score = page_score(q, k, mode="dot", group="softmax_sum", scale=SCALE)
    close(jnp.sum(score, -1), H // K)


def refused(message: str, call, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=message):
        call(*args, **kwargs)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_small_pages_are_no_kernels_matter(backend):
    q, k, v, pages, counts = cache(np.random.default_rng(8))
    args = q, pooled(k)[:, :8], pooled(v)[:, :8], pages, counts
    assert np.isfinite(paged_decode(*args, scale=SCALE).out).all()
    with pytest.raises(NotImplementedError, match="pages of 16 to 128 slots; got 8"):
        paged_decode(*args, scale=SCALE, backend=backend)


def test_errors_of_paged_decode():
    rng = np.random.default_rng(8)
    q, k, v, pages, counts = cache(rng)
    k, v = pooled(k), pooled(v)
    call = functools.partial(paged_decode, scale=SCALE)
    refused(
        "`q` must be .* T in 1", call, jnp.zeros((B, H, 17, D)), k, v, pages, counts
    )
    refused("multiple of the KV heads", call, q[:, :3], k, v, pages, counts)
    refused("`k_pages` must be", call, q, k[..., :8], v, pages, counts)
    refused("`k_pages` must be", call, q, k[None], v, pages, counts)
    refused("at least one slot", call, q, k[:, :0], v[:, :0], pages, counts)
    refused("`v_pages` must hold", call, q, k, v[1:], pages, counts)
    refused("`selected` must be", call, q, k, v, pages[0], counts)
    refused("int32", call, q, k, v, pages.astype(jnp.int16), counts)
    refused("`counts` must be", call, q, k, v, pages, counts[:1])
    refused("`fill` must be", call, q, k, v, pages, counts, fill=counts)
    refused("`bias` must be", call, q, k, v, pages, counts, bias=jnp.zeros((B, K, C)))
    codes = quantized(rng, (B * K * C, PAGE, D), **KIVI4[0])
    for wrong, message in (
        ({"group": 5}, "`k_pages.group` must divide"),
        ({"axis": "slot"}, "`k_pages.axis` must be"),
        ({"bits": 3}, "`k_pages.bits` must be"),
        ({"scale": codes.scale[:, :, :4]}, "`k_pages.scale` must be"),
        ({"codes": codes.codes[..., :4]}, "`k_pages.codes` must be"),
    ):
        bad = dataclasses.replace(codes, **wrong)
        refused(message, call, q, bad, v, pages, counts)


@pytest.mark.parametrize(
    ("page", "width", "taken"),
    [(16, 128, True), (128, 64, True), (64, 64, False), (128, 1, False)],
)
def test_pools_that_a_tpu_would_copy_are_refused(page, width, taken):
    call = functools.partial(_refuse_copies, "k_pages", jnp.zeros((2, page, width)))
    if taken:
        return call()
    with pytest.raises(NotImplementedError, match="paged_decode: .* `k_pages`"):
        call()


def test_errors_of_pages():
    q, k, _, _, _ = cache(np.random.default_rng(9))
    live = jnp.ones(k.shape[:3], bool)
    refused("`page` must divide", page_summary, k, live, page=10)
    refused("`live` must be", page_summary, k, live[:1], page=PAGE)
    refused("`keys` must be", page_summary, k[0], live, page=PAGE)
    score = functools.partial(page_score, q, k)
    refused("`mode` must be one of", score, mode="dots", group="max")
    refused("`group` must be one of", score, mode="dot", group="mean")
    refused("`b` must be an array", score, mode="bound", group="max")
    refused("`b` must be .* None", score, k, mode="dot", group="max")
    refused("`scale` must be", score, mode="dot", group="softmax_max")
    refused("`scale` must be", score, mode="dot", group="max", scale=1.0)
    refused(
        "multiple of the KV heads", page_score, q[:, :3], k, mode="dot", group="max"
    )
