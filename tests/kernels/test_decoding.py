"""The register program of the GPU's decode kernels, run lane by lane."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.decode_attention import decode_attention
from kvjax.pallas_kernels.decoding import program, results
from kvjax.pallas_kernels.decoding.stored import Stored
from kvjax.pallas_kernels.decoding.warps import Simulated
from kvjax.pallas_kernels.quantize_pack import quantize_pack
from kvjax.pallas_kernels.quantized import Quantized

ROWS = 5
PLAIN = None
STORES = {
    "bf16": (PLAIN, PLAIN),
    "int8 token": ((8, "token", 64, True), (8, "token", 64, True)),
    "int8 with zeros": ((8, "channel", 64, False), (8, "token", 32, False)),
    "int4": ((4, "channel", 32, False), (4, "token", 32, False)),
    "int4 symmetric": ((4, "channel", 16, True), (4, "token", 16, True)),
    "int4 keys per token": ((4, "token", 32, False), PLAIN),
    "int2": ((2, "channel", 32, False), (2, "token", 32, False)),
    "int2 symmetric": ((2, "token", 16, True), (2, "token", 64, True)),
}


def stored(x, codec):
    if codec is None:
        return x.astype(jnp.bfloat16)
    bits, axis, group, symmetric = codec
    live = jnp.ones(x.shape[:-1], bool)
    return quantize_pack(
        x, live, bits=bits, axis=axis, group=group, symmetric=symmetric, backend="xla"
    )


def as_bytes(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(x.shape[0], -1)


def one_block(plan, q, keys, values, begins, ends):
    """What the program makes of one block of a head."""
    ops = Simulated()
    padded = jnp.zeros((8 * plan.columns, q.shape[1])).at[: len(q)].set(q)
    near, far = {}, {}
    for name, side in (("keys", keys), ("values", values)):
        if not isinstance(side, Quantized):
            near[name] = as_bytes(side[0, 0])
            continue
        near[name] = side.codes[0, 0]
        for part in ("scale", "zero"):
            array = getattr(side, part)
            if array is not None and side.axis == "token":
                far[f"{name}_{part}"] = array
            elif array is not None:
                near[f"{name}_{part}"] = as_bytes(array[0, 0])
    if plan.keys.coded:
        weight = np.empty(q.shape[1])
        for _, slab, channel in plan.keys.tiles:
            weight[channel : channel + 16] = 2.0 ** (plan.keys.bits * slab)
        lowered = (padded / weight).astype(jnp.float16)
    else:
        lowered = padded.astype(jnp.bfloat16)
    zero = ops.word(0)
    scale = jnp.full((8 * plan.columns,), q.shape[1] ** -0.5, jnp.float32)
    query = {
        "q": program.queries(ops, plan, lowered, zero),
        "factor": [
            ops.as_number(x) for x in program.per_column(ops, plan, scale, zero)
        ],
    }
    places = [(row, row) for row in program.rows(ops)]
    more = program.beside(ops, plan, places, far)
    bounds = ops.word(begins), ops.word(ends)
    state = program.step(ops, plan, near, more, query, bounds, program.start(ops, plan))
    found = program.values.finish(ops, plan, plan.split(state))
    return results.collected(plan, jnp.stack(found)[None, None, None])


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", STORES)
def test_one_block(name, d):
    """Registers, codes, scales and zeros add up to attention over the block."""
    rng = np.random.default_rng(0)
    shape = (1, 1, program.BLOCK, d)
    keys, values = (
        stored(jnp.asarray(rng.standard_normal(shape), jnp.float32), codec)
        for codec in STORES[name]
    )
    q = jnp.asarray(rng.standard_normal((1, ROWS, 1, d)), jnp.bfloat16)
    plan = program.Plan(keys=Stored.of(keys), values=Stored.of(values), columns=1)
    begins, ends = 3, 117
    got = jax.jit(functools.partial(one_block, plan, begins=begins, ends=ends))(
        q[0, :, 0].astype(jnp.float32), keys, values
    )
    args = (q, keys, values)

    def cut(x):
        return x

    want = decode_attention(
        *args,
        jnp.asarray([[ends]], jnp.int32),
        positions=jnp.asarray(
            [[np.where(np.arange(program.BLOCK) < begins, -1, 0)]], jnp.int32
        ),
        q_positions=jnp.zeros((1, 1), jnp.int32),
        scale=d**-0.5,
        backend="reference",
    )
    np.testing.assert_allclose(got.lse[0, 0, :ROWS], want.lse[0, :, 0], atol=4e-3)
    np.testing.assert_allclose(got.out[0, 0, :ROWS], want.out[0, :, 0], atol=8e-3)
