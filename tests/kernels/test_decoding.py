"""The register program of the GPU's decode kernels, run lane by lane."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.decode_attention import decode_attention
from kvjax.pallas_kernels.decoding import program, results, values
from kvjax.pallas_kernels.decoding.stored import TINY, Stored
from kvjax.pallas_kernels.decoding.warps import Simulated
from kvjax.pallas_kernels.quantize_pack import quantize_pack
from kvjax.pallas_kernels.quantized import Quantized

STORES = {
    "bf16": (None, None),
    "int8 per token": ((8, "token", 64, True), (8, "token", 64, True)),
    "int8 with zeros": ((8, "channel", 64, False), (8, "token", 32, False)),
    "int4": ((4, "channel", 32, False), (4, "token", 32, False)),
    "int4 symmetric": ((4, "channel", 16, True), (4, "token", 16, True)),
    "int4 keys per token": ((4, "token", 32, False), None),
    "int2": ((2, "channel", 32, False), (2, "token", 32, False)),
    "int2 symmetric": ((2, "token", 16, True), (2, "token", 64, True)),
}


def stored(rng, shape, codec):
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    if codec is None:
        return x.astype(jnp.bfloat16)
    bits, axis, group, symmetric = codec
    how = {"bits": bits, "axis": axis, "group": group, "symmetric": symmetric}
    pack = jax.jit(functools.partial(quantize_pack, **how, backend="xla"))
    return pack(x, jnp.ones(shape[:-1], bool))


def memories(name, side):
    """What the program reads of keys or values: near, by bytes, and far."""
    if not isinstance(side, Quantized):
        return {name: np.asarray(side[0, 0]).view(np.uint8)}, {}
    near, far = {name: np.asarray(side.codes[0, 0])}, {}
    for part in ("scale", "zero"):
        array = getattr(side, part)
        if array is not None and side.axis == "token":
            far[f"{name}_{part}"] = np.asarray(array)
        elif array is not None:
            near[f"{name}_{part}"] = np.asarray(array[0, 0]).view(np.uint8)
    return near, far


def prepared(plan, q):
    """Queries `[X, D]` as the products read them."""
    padded = np.zeros((8 * plan.columns, q.shape[1]), np.float32)
    padded[: len(q)] = q
    if not plan.keys.coded:
        return np.asarray(jnp.asarray(padded, jnp.bfloat16)), 1.0
    for _, slab, channel in plan.keys.tiles:
        padded[:, channel : channel + 16] /= 2.0 ** (plan.keys.bits * slab)
    return padded.astype(np.float16), 1 / TINY


def one_block(plan, q, sides, begins, ends):
    """What the program makes of one block of a head."""
    ops = Simulated()
    near, far = {}, {}
    for name, side in zip(("keys", "values"), sides, strict=True):
        here, there = memories(name, side)
        near, far = {**near, **here}, {**far, **there}
    lowered, raised = prepared(plan, q)
    zero = ops.word(0)
    factor = np.full(8 * plan.columns, q.shape[1] ** -0.5 * raised, np.float32)
    factors = program.per_column(ops, plan, factor, zero)
    query = {
        "q": program.queries(ops, plan, lowered, zero),
        "factor": [ops.as_number(x) for x in factors],
    }
    places = [(row, row) for row in program.rows(ops)]
    more = program.beside(ops, plan, places, far)
    assert len(more) == plan.beside
    bounds = ops.word(begins), ops.word(ends)
    state = program.start(ops, plan)
    with np.errstate(all="ignore"):
        state = program.step(ops, plan, near, more, query, bounds, state)
    found = values.finish(ops, plan, plan.split(state))
    assert len(state) == plan.kept and len(found) == plan.results
    return results.collected(plan, jnp.asarray(np.stack(found))[None, None, None])


@pytest.mark.sweep(12, 24)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("rows", [5, 12])
@pytest.mark.parametrize("name", STORES)
def test_one_block(name, rows, d):
    """Registers, codes, scales and zeros add up to attention over the block."""
    rng = np.random.default_rng(0)
    shape = (1, 1, program.BLOCK, d)
    sides = [stored(rng, shape, codec) for codec in STORES[name]]
    q = jnp.asarray(rng.standard_normal((1, rows, 1, d)), jnp.bfloat16)
    plan = program.Plan(
        keys=Stored.of(sides[0]), values=Stored.of(sides[1]), columns=-(-rows // 8)
    )
    begins, ends = 3, 117
    got = one_block(plan, np.asarray(q[0, :, 0], np.float32), sides, begins, ends)
    held = np.where(np.arange(program.BLOCK) < begins, -1, 0)
    reference = functools.partial(decode_attention, scale=d**-0.5, backend="reference")
    want = jax.jit(reference)(
        q,
        sides[0],
        sides[1],
        jnp.asarray([[ends]], jnp.int32),
        positions=jnp.asarray(held[None, None], jnp.int32),
        q_positions=jnp.zeros((1, 1), jnp.int32),
    )
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    close(got.lse[0, 0, :rows], want.lse[0, :, 0], atol=4e-3)
    close(got.out[0, 0, :rows], want.out[0, :, 0], atol=4e-3)
