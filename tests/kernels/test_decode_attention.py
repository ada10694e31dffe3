"""`decode_attention`: what it refuses, and what must not matter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.decode_attention import decode_attention, xla
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
    "`keys` must have the rows of `q`, B=2, without `row`": {
        "keys": jnp.zeros((4, 2, 16, 8))
    },
    "at least the rows of `q`, B=2, with `row`; got 1": {
        "keys": jnp.zeros((1, 2, 16, 8)),
        "row": jnp.int32(0),
    },
    "`values` must be \\[R, K, S, D\\] = \\[4, ": {
        "keys": jnp.zeros((4, 2, 16, 8)),
        "row": jnp.int32(0),
    },
    "`row` must be a scalar": {"row": jnp.zeros((2,), jnp.int32)},
    "`row` must have dtype int32": {"row": jnp.float32(0)},
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


LAYERS = 3


def stacked(arrays):
    """Other rows before and behind; the middle ones are those given."""
    return jax.tree.map(lambda x: jnp.concatenate([x + 1, x, x * 3]), arrays)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_gradients_reach_the_rows_that_are_read(backend, ragged):
    how: dict[str, Any] = {}
    if ragged:
        how = {"offsets": [[0, 5, 17], [3, 6, 20]], "slots": 20}
    (q, keys, values, lengths), kwargs = made(**how)
    keys, values = jnp.nan_to_num(keys), jnp.nan_to_num(values)

    def loss(q, keys, values, row):
        part = decode_attention(
            q, keys, values, lengths, **kwargs, row=row, backend=backend
        )
        return jnp.sum(jnp.sin(part.out))

    slopes = jax.grad(loss, (0, 1, 2))
    want = slopes(q, keys, values, None)
    stack = stacked((keys, values))
    got = jax.jit(slopes)(q, stack[0], stack[1], jnp.int32(2))
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    for of_stack, of_layer in zip(got[1:], want[1:], strict=True):
        before, here, behind = jnp.split(of_stack, LAYERS)
        np.testing.assert_allclose(here, of_layer, atol=1e-6)
        assert not np.any(before) and not np.any(behind)


@pytest.mark.parametrize("free", [0.0, np.nan])
@pytest.mark.parametrize("located", [False, True])
def test_long_layers_are_read_block_by_block(monkeypatch, free, located):
    """Uncleared where all is finite, cleared where a free slot is not."""
    monkeypatch.setattr(xla, "WHOLE", 16)
    monkeypatch.setattr(xla, "BLOCK", 8)
    (q, keys, values, lengths), kwargs = build(
        np.random.default_rng(0), [[33, 50]], heads=4, slots=50, d=8, located=located
    )
    keys, values = (jnp.nan_to_num(x, nan=free) for x in (keys, values))
    want = decode_attention(q, keys, values, lengths, **kwargs, backend="reference")
    if located:
        kwargs["positions"] = stacked(kwargs["positions"])
    keys, values = stacked((keys, values))
    kwargs |= {"row": jnp.int32(1)}
    got = decode_attention(q, keys, values, lengths, **kwargs, backend="xla")
    np.testing.assert_allclose(got.out, want.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-6)


@pytest.mark.parametrize(("slots", "most"), [(4 * xla.WHOLE, 2), (xla.WHOLE, 5)])
def test_the_stack_stays_in_place(slots, most):
    """A loop over layers that writes and reads has no copy of it; long ones blocks."""
    layers = 8
    shape = (layers, 2, slots, 16)

    def run(q, keys, values, lengths):
        def layer(i, state):
            q, keys, values = state
            new = q[:, :2]
            keys = jax.lax.dynamic_update_slice(keys, new, (i, 0, 5, 0))
            values = jax.lax.dynamic_update_slice(values, new, (i, 0, 5, 0))
            part = decode_attention(
                q, keys, values, lengths, row=i, scale=0.2, backend="xla"
            )
            return part.out, keys, values

        return jax.lax.fori_loop(jnp.int32(0), layers, layer, (q, keys, values))

    struct = jax.ShapeDtypeStruct
    stack = struct(shape, jnp.float32)
    compiled = (
        jax.jit(run, donate_argnums=(1, 2))
        .lower(
            struct((1, 4, 1, 16), jnp.float32), stack, stack, struct((1, 2), "int32")
        )
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < most * 4 * 2 * slots * 16  # layers of keys


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
