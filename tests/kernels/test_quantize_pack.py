"""What `quantize_pack` refuses and promises beyond parity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.quantize_pack import dequantize, quantize_pack
from kvjax.pallas_kernels.quantize_pack.reference import half
from kvjax.pallas_kernels.quantize_pack.rounding import half as half_in_integers
from kvjax.pallas_kernels.quantized import numbers

X = jnp.zeros((2, 64, 32))
LIVE = jnp.ones((2, 64), bool)
GOOD: dict[str, Any] = {"bits": 4, "axis": "channel", "group": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "`bits` must be one of"),
        ({"axis": "slot"}, "`axis` must be one of"),
        ({"group": 48}, "must divide the 64 slots"),
        ({"axis": "token", "group": 24}, "must divide the 32 channels"),
        ({"backend": "cuda"}, "`backend` must be one of"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_pack(X, LIVE, **(GOOD | change))


def test_bad_arrays():
    with pytest.raises(ValueError, match="`live`"):
        quantize_pack(X, LIVE[:, 1:], **GOOD)
    with pytest.raises(ValueError, match="`live` must have dtype bool"):
        quantize_pack(X, LIVE.astype(jnp.int32), **GOOD)
    with pytest.raises(ValueError, match="2-bit codes pack 4 channels"):
        two: dict[str, Any] = GOOD | {"bits": 2}
        quantize_pack(X[..., :30], LIVE, **two)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_within_half_a_step(bits, axis, symmetric):
    x = jnp.asarray(np.random.default_rng(bits).standard_normal((2, 64, 32)))
    x = x.astype(jnp.float32)
    how: dict[str, Any] = {
        "bits": bits,
        "axis": axis,
        "group": 16,
        "symmetric": symmetric,
    }
    held = quantize_pack(x, LIVE, **how)
    along = 1 if axis == "channel" else 2
    step = jnp.repeat(numbers(held.scale).astype(jnp.float32), 16, axis=along)
    assert held.shape == x.shape
    assert np.all(np.abs(dequantize(held) - x) <= 0.5 * step * (1 + 1e-5))
    assert dequantize(held, jnp.bfloat16).dtype == jnp.bfloat16


def test_no_gradient_flows():
    def value(x):
        return jnp.sum(dequantize(quantize_pack(x, LIVE, **GOOD)))

    assert not np.any(jax.grad(value)(X + 1.0))


def test_float16_rounding_in_integers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(4000) * 10.0 ** rng.uniform(-9, 6, 4000)
    edges = [0.0, 65504, 65520, -1e9, 6e-8, 3e-8, 2.9e-8, 6.1e-5]
    x = jnp.asarray(np.concatenate([x, edges]), jnp.float32)
    value, bits = jax.jit(half_in_integers)(x)
    words = jax.lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16)
    np.testing.assert_array_equal(value, half(x))
    np.testing.assert_array_equal(words.astype(jnp.float32), half(x))
