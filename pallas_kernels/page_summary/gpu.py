"""`page_summary` on Hopper: one thread block per (row, KV head, block of slots).

Each thread of a warpgroup owns one channel (or several) and walks the slots, which the
copy engine has brought near; dead slots are skipped by all threads at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels import compat, tuning
from kvjax.pallas_kernels.page_summary.summary import PageSummary

THREADS, MOST_ROWS, NEAR_BYTES = 128, 256, 128 << 10


def page_summary(keys, live, *, page, tiles=None, interpret=False) -> PageSummary:
    """See `api.page_summary`."""
    b, k, s, d = keys.shape
    if d % THREADS:
        raise NotImplementedError(
            f"page_summary: the head dim must be a multiple of {THREADS}, the threads "
            f"of a warpgroup; got {d}."
        )
    block = tuning.tiles("page_summary", "h200", tiles)["slots"]
    # One copy takes 256 rows at most, and two blocks should fit an SM.
    most = min(block, MOST_ROWS, NEAR_BYTES // (d * keys.dtype.itemsize))
    block = most // page * page
    if block == 0:
        raise NotImplementedError(
            f"page_summary: a page of {page} slots of {d} channels does not fit one "
            f"copy of {most} slots."
        )
    steps = pl.cdiv(s, block)
    live = jnp.pad(live.astype(jnp.int32), [(0, 0), (0, 0), (0, steps * block - s)])
    out = jax.ShapeDtypeStruct((b, k, steps * block // page, d), keys.dtype)
    found = plgpu.SMEM((block // page, d), keys.dtype)
    run = plgpu.kernel(
        functools.partial(_kernel, page=page),
        out_type=[out] * 3,
        scratch_types=dict(
            keys_near=plgpu.SMEM((block, d), keys.dtype),
            low_near=found,
            high_near=found,
            mean_near=found,
            here=plgpu.Barrier(),
        ),
        grid=(steps, k, b),
        grid_names=("step", "head", "row"),
        interpret=compat.gpu_interpret(interpret),
    )
    return PageSummary(*(x[:, :, : s // page] for x in run(keys, live)))


def _kernel(
    keys_ref,
    live_ref,
    *out_refs,
    page,
    keys_near,
    low_near,
    high_near,
    mean_near,
    here,
):
    """The pages of one block of slots."""
    step, head, row = (lax.axis_index(name) for name in ("step", "head", "row"))
    block, d = keys_near.shape
    some = pl.ds(step * block, block)
    plgpu.copy_gmem_to_smem(keys_ref.at[row, head, some], keys_near, here)
    plgpu.barrier_wait(here)
    layout = plgpu.Layout.WG_STRIDED((d,), vec_size=1)

    def filled(value):
        return plgpu.layout_cast(jnp.full((d,), value, jnp.float32), layout)

    def one_page(at, _):
        def one_slot(slot, state):
            slot = at * page + slot

            def add(low, high, total, count):
                key = plgpu.load(keys_near.at[slot], layout=layout)
                key = key.astype(jnp.float32)
                low, high = jnp.minimum(low, key), jnp.maximum(high, key)
                return low, high, total + key, count + 1.0

            alive = live_ref[row, head, step * block + slot] > 0
            return lax.cond(alive, add, lambda *state: state, *state)

        nothing = filled(jnp.inf), filled(-jnp.inf), filled(0.0), jnp.float32(0)
        low, high, total, count = lax.fori_loop(0, page, one_slot, nothing)
        some, zero = low <= high, jnp.zeros_like(low)
        low_near[at] = jnp.where(some, low, zero).astype(low_near.dtype)
        high_near[at] = jnp.where(some, high, zero).astype(high_near.dtype)
        mean_near[at] = (total / jnp.maximum(count, 1.0)).astype(mean_near.dtype)

    lax.fori_loop(0, block // page, one_page, None)
    plgpu.commit_smem()
    pages = pl.ds(step * (block // page), block // page)
    for near, out_ref in zip((low_near, high_near, mean_near), out_refs, strict=True):
        plgpu.copy_smem_to_gmem(near, out_ref.at[row, head, pages])
    plgpu.wait_smem_to_gmem(0)
