"""The specification: a dense mask from the pattern, softmax in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.pallas_kernels.partial import Partial, cap, softmax_partial
from kvjax.pallas_kernels.sparse_prefill.args import SparseArgs
from kvjax.pallas_kernels.sparse_prefill.layout import layout
from kvjax.pallas_kernels.sparse_prefill.patterns import Pattern, kv_blocks, table


def listed_tokens(
    pattern: Pattern, q_start: Int[Array, "B"], tokens: int, slots: int
) -> Bool[Array, "B Hx T S"]:
    """Which (query, key) pairs lie in a listed block; no other rule is applied."""
    q_blocks, blocks = -(-tokens // pattern.block_q), -(-slots // pattern.block_k)
    batch, lists = table(pattern).shape[:2]
    rows = []
    for i in range(q_blocks):
        index, used = kv_blocks(pattern, i, q_start)
        hit = (index[..., None] == jnp.arange(blocks)) & used[..., None]
        rows.append(jnp.any(hit, axis=2))
    mask = jnp.stack(rows, axis=2) if rows else jnp.zeros((batch, lists, 0, blocks))
    mask = jnp.repeat(mask.astype(bool), pattern.block_q, axis=2)
    return jnp.repeat(mask, pattern.block_k, axis=3)[:, :, :tokens, :slots]


def sparse_prefill(args: SparseArgs) -> Partial:
    """Attention under the pattern's dense mask; see the public function."""
    q, q_start, kv_len, rules = args.q, args.q_start, args.kv_len, args.rules
    lay = layout(q, args.k, args.pattern)
    group = lay.heads // lay.kv_heads
    mask = listed_tokens(args.pattern, q_start, lay.tokens, lay.slots)
    mask = jnp.repeat(mask, lay.heads // mask.shape[1], axis=1)
    q_positions = (q_start[:, None] + jnp.arange(lay.tokens))[:, None, :, None]
    k_positions = jnp.arange(lay.slots)
    length = kv_len[:, None, None, None]
    mask = mask & rules.visible(q_positions, k_positions, length)
    live = (k_positions < kv_len[:, None])[:, None, :, None]
    # Free slots may hold NaN: 0 * NaN would reach the outputs and gradients.
    k, v = (jnp.where(live, x, 0).astype(jnp.float32) for x in (args.k, args.v))
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    logits = jnp.einsum(
        "BHTD,BHSD->BHTS", q.astype(jnp.float32), k, precision=jax.lax.Precision.HIGHEST
    )
    return softmax_partial(cap(logits * rules.scale, rules.softcap), mask, v)
