"""The kernel of `coded`: blocks of one split of one list, fetched ahead."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvjax.pallas_kernels.decoding import lanes, program, values
from kvjax.pallas_kernels.decoding.program import BLOCK


def kernel(
    *refs, plan, walk, splits, stages, groups, swizzles, names, interpret, **scratch
):
    """The blocks of one split of one list."""
    sources = dict(zip(names[0], refs, strict=False))
    far = dict(zip(names[1], refs[len(sources) :], strict=False))
    out_ref = refs[-1]
    here, done = scratch.pop("here"), scratch.pop("done")
    run = lanes.simulated if interpret else lanes.emitted
    split, head, row = (lax.axis_index(name) for name in ("split", "head", "row"))
    first, begins, ends = walk.span(far, row, head)
    blocks = lax.div(ends - first + (BLOCK - 1), BLOCK)
    blocks = jnp.where(ends > begins, blocks, 0)
    each = lax.div(blocks + (splits - 1), splits)
    low = jnp.minimum(split * each, blocks)
    steps = jnp.minimum(low + each, blocks) - low

    def begin(step):
        return first + (low + step) * BLOCK

    def fetch(step, stage):
        for number, index in enumerate(walk.pieces(far, row, head, begin(step))):
            for name, source in sources.items():
                size = walk.piece // groups[name]
                to = scratch[name].at[stage]
                if walk.piece != BLOCK:
                    to = scratch[name].at[stage, number * size : (number + 1) * size]
                where = index(groups[name])
                plgpu.copy_gmem_to_smem(source.at[where], to, here.at[stage])

    for stage in range(stages):
        lax.cond(stage < steps, functools.partial(fetch, stage, stage), lambda: None)

    def of_queries(ops, words, arrays, near, far):
        number, of_row = words
        at = ops.mul(number, ops.word(8 * plan.columns))
        found = program.queries(
            ops, plan, far["queries"], ops.mul(at, ops.word(plan.keys.width))
        )
        found += program.per_column(ops, plan, far["factor"], at)
        if plan.located:
            at = ops.mul(of_row, ops.word(8 * plan.columns))
            found += program.per_column(ops, plan, far["now"], at)
        return found

    def of_slots(ops, words, arrays, near, far):
        at = [ops.add(words[2], slot) for slot in program.rows(ops)]
        places = [walk.place(ops, far, words[:2], slot) for slot in at]
        return program.beside(ops, plan, places, far)

    def of_block(ops, words, arrays, near, far):
        query, state, *more = arrays
        count, pairs = plan.operands, 2 * plan.columns
        named = {
            "q": query[:count],
            "factor": [ops.as_number(x) for x in query[count : count + pairs]],
            "now": query[count + pairs :],
        }
        return program.step(ops, plan, near, sum(more, []), named, words, state)

    def finish(ops, words, arrays, near, far):
        return values.finish(ops, plan, plan.split(arrays[0]))

    parts = ("queries", "factor", *(["now"] if plan.located else []))
    query = run(
        of_queries,
        (plan.operands + (4 if plan.located else 2) * plan.columns, jnp.uint32),
        (row * out_ref.shape[1] + head, row),
        (),
        {},
        {name: far[name] for name in parts},
    )
    besides = {
        name: far[name]
        for name in far
        if name not in (*parts, "start", "stop", "lead", "counts")
    }

    stored = walk.stored(far, row)

    def narrow(step):
        """What lies beside the slots of a block; something where there is none."""
        if not plan.beside:
            return jnp.int32(0)
        step = jnp.maximum(jnp.minimum(step, steps - 1), 0)
        at = jnp.where(steps > 0, begin(step), first)
        how = (plan.beside, jnp.uint32)
        return run(of_slots, how, (stored, head, at), (), {}, besides)

    def body(step, carried):
        state, more = carried
        stage = lax.rem(step, stages)
        after = narrow(step + 1)
        plgpu.barrier_wait(here.at[stage])
        near = {
            name: lanes.Near(ref=scratch[name], stage=stage, swizzle=swizzles[name])
            for name in sources
        }
        bounds = begins - begin(step), ends - begin(step)
        given = (query, state, more) if plan.beside else (query, state)
        state = run(of_block, (plan.kept, jnp.float32), bounds, given, near, {})
        # All warps must have read the block before the next one overwrites it.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        lax.cond(
            step + stages < steps, lambda: fetch(step + stages, stage), lambda: None
        )
        return state, after

    def zeros(ops, words, arrays, near, far):
        return program.start(ops, plan)

    state = run(zeros, (plan.kept, jnp.float32), (), (), {}, {})
    state, _ = lax.fori_loop(0, steps, body, (state, narrow(0)))
    found = run(finish, (plan.results, jnp.float32), (), (state,), {}, {})
    out_ref[row, head, split] = found
