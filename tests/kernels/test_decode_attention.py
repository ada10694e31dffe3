"""`decode_attention`: what it refuses, and what must not matter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.decode_attention import decode_attention
from kvjax.pallas_kernels.decode_attention.cases import build
from kvjax.pallas_kernels.decode_attention.workloads import BF16
from kvjax.pallas_kernels.decoding.splits import union
from kvjax.pallas_kernels.partial import Partial, merge

LENGTHS = [[5, 12], [0, 8]]


def made(**how: Any):
    settings: dict[str, Any] = {"heads": 4, "slots": 16, "d": 8} | how
    return build(np.random.default_rng(0), LENGTHS, **settings)


def changed(**arguments):
    """Arguments of one call, some of them replaced."""
    (q, keys, values, lengths), kwargs = made(located=True)
    named = dict(q=q, keys=keys, values=values, lengths=lengths, **kwargs)
    return {**named, **arguments}


CODES = made(keys=(4, "channel", 8, False))[0][1]

WRONG = {
    "`q` must be": {"q": jnp.zeros((2, 4, 8))},
    "1 to 16 queries": {"q": jnp.zeros((2, 4, 17, 8))},
    "multiple of the KV heads": {"q": jnp.zeros((2, 3, 1, 8))},
    "`lengths` must have dtype int32": {"lengths": jnp.zeros((2, 2))},
    "`keys` must be": {"keys": jnp.zeros((2, 2, 16, 4))},
    "`values` must be": {"values": jnp.zeros((2, 2, 15, 8))},
    "`keys` must have dtype": {"keys": jnp.zeros((2, 2, 16, 8), jnp.int8)},
    "`offsets` must be": {"offsets": jnp.zeros((2, 2), jnp.int32)},
    "go together; got no `q_positions`": {"q_positions": None},
    "`positions` must be": {"positions": jnp.zeros((2, 16), jnp.int32)},
    "`window` must be at least 1": {"window": 0},
    "`window` needs": {"positions": None, "q_positions": None, "window": 3},
    "`softcap` must be positive": {"softcap": 0.0},
    "bits` must be 1, 2, 4 or 8": {"keys": dataclasses.replace(CODES, bits=3)},
    "axis` must be": {"keys": dataclasses.replace(CODES, axis="slot")},
    "group` must divide the 16 slots": {"keys": dataclasses.replace(CODES, group=5)},
    "`keys.scale` must be": {"keys": dataclasses.replace(CODES, group=4)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = changed(**WRONG[message])
    args = [arguments.pop(name) for name in ("q", "keys", "values", "lengths")]
    with pytest.raises(ValueError, match=message):
        decode_attention(*args, **arguments)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_scales_may_be_floats(backend):
    """They are the bits of a float16, or float16 itself."""
    args, kwargs = made(keys=(4, "channel", 8, False), values=(8, "token", 8, True))

    def half(x):
        if x.dtype != jnp.int16:
            return x
        return jax.lax.bitcast_convert_type(x, jnp.float16)

    want = decode_attention(*args, **kwargs, backend=backend)
    got = decode_attention(*jax.tree.map(half, args), **kwargs, backend=backend)
    np.testing.assert_array_equal(got.out, want.out)


def test_ragged_is_slots_in_one_buffer():
    (q, keys, values, lengths), kwargs = made()
    k, v = (x.reshape(2, 32, 8) for x in (keys, values))
    offsets = jnp.asarray([[0, 16, 32]] * 2, jnp.int32)
    want = decode_attention(q, keys, values, lengths, **kwargs)
    got = decode_attention(q, k, v, lengths, offsets=offsets, **kwargs)
    np.testing.assert_allclose(got.out, want.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-6)


def test_splits_merge_as_parts_do():
    """The union of the GPU's splits is that of `partial`."""
    rng = np.random.default_rng(1)
    out = jnp.asarray(rng.standard_normal((1, 2, 3, 4, 8)), jnp.float32)
    lse = jnp.asarray(rng.standard_normal((1, 2, 3, 4)), jnp.float32)
    lse = lse.at[:, 0, 1].set(-jnp.inf).at[:, 1, :, 0].set(-jnp.inf)
    out = jnp.where(jnp.isneginf(lse)[..., None], 0.0, out)
    got = union(out, lse)
    want = merge([Partial(out[:, :, i], lse[:, :, i]) for i in range(3)])
    np.testing.assert_allclose(got.out.ravel(), want.out.ravel(), atol=1e-6)
    np.testing.assert_allclose(got.lse.ravel(), want.lse.ravel(), atol=1e-6)


@pytest.mark.parametrize(
    ("message", "how"),
    [
        ("64 or 128 channels", {"keys": (8, "token", 8, True), "dtype": BF16}),
        ("groups per token", {"d": 64, "values": (8, "channel", 8, True)}),
        ("groups of 16", {"d": 64, "keys": (8, "token", 8, True)}),
        ("16 queries", {"d": 64, "t": 16, "located": True}),
        ("64 queries", {"heads": 16, "t": 16, "d": 64}),
        ("float32", {"d": 64, "located": True, "dtype": jnp.float32}),
    ],
)
def test_gpu_refuses(message, how):
    args, kwargs = made(**{"dtype": BF16, **how})
    with pytest.raises(NotImplementedError, match=f"decode_attention: .*{message}"):
        decode_attention(*args, **kwargs, backend="gpu")


def test_tpu_refuses_groups_across_chunks():
    args, kwargs = build(
        np.random.default_rng(0),
        [[96]],
        heads=1,
        slots=96,
        d=8,
        keys=(8, "channel", 48, False),
    )
    with pytest.raises(NotImplementedError, match="decode_attention: `keys`"):
        decode_attention(*args, **kwargs, backend="tpu")
