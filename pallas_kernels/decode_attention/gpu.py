"""`decode_attention` on Hopper: a thread block per (row, KV head, split of its slots).

Plain keys and values of one dtype go through `decoding.plain`; codes, positions, and
keys and values of two dtypes through `decoding.coded`. Blocks start at the head's first
slot, rounded down to what copies want; only the first and the last are masked.
"""

import jax.numpy as jnp

from kvjax.pallas_kernels import tuning
from kvjax.pallas_kernels.decode_attention.args import DecodeArgs
from kvjax.pallas_kernels.decoding import coded, plain, walks
from kvjax.pallas_kernels.partial import Partial


def decode_attention(args: DecodeArgs, *, tiles=None, interpret=False) -> Partial:
    """See `api.decode_attention`."""
    q, keys, values, lengths = args.q, args.keys, args.values, args.lengths
    (b, h, t, d), kv_heads = q.shape, lengths.shape[1]
    slots, rows = keys.shape[-2], h // kv_heads * t
    by_registers = coded.wanted(keys, values) or args.positions is not None
    if by_registers:
        why = coded.refusal(q, keys, values, rows, ("keys", "values"))
    else:
        why = plain.refusal(keys, values, rows)
    if slots % 8:  # what tiles in shared memory want
        why = f"the slots must be a multiple of 8; got {slots}"
    if why:
        raise NotImplementedError(f"decode_attention: {why}.")
    tile = tuning.tiles("decode_attention", "h200", tiles)
    start = jnp.zeros_like(lengths) if args.offsets is None else args.offsets[:, :-1]
    stop = jnp.clip(start + lengths, start, slots)
    block = coded.BLOCK if by_registers else tile["block"]
    programs = tile["coded_programs" if by_registers else "programs"]
    walk = walks.Slots(
        heads=kv_heads,
        slots=slots,
        ragged=args.offsets is not None,
        block=block,
        align=block if by_registers else 8,
    )
    shared = {
        "q": q.reshape(b, kv_heads, rows, d),
        "keys": keys,
        "values": values,
        "walk": walk,
        "far": {"start": start, "stop": stop},
        "scale": args.scale,
        "softcap": args.softcap,
        "splits": max(1, min(programs // (b * kv_heads), -(-slots // block))),
        "interpret": interpret,
    }
    if args.row is not None:
        shared["far"]["lead"] = jnp.reshape(args.row, 1)
    if not by_registers:
        part = plain.decode(plain.Call(**shared, stages=tile["stages"]))
        return Partial(part.out.reshape(q.shape), part.lse.reshape(q.shape[:-1]))
    now = None
    if args.positions is not None and args.q_positions is not None:
        shared["far"]["positions"] = args.positions
        now = jnp.tile(args.q_positions, (1, h // kv_heads))
    stages = tile["coded_stages"]
    call = coded.Call(**shared, stages=stages, now=now, window=args.window)
    part = coded.decode(call)
    return Partial(part.out.reshape(q.shape), part.lse.reshape(q.shape[:-1]))
