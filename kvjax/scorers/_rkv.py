"""R-KV: attention of the last queries, less likeness to the other keys."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.config import sized
from kvjax.fields import Kernel, Share, Size
from kvjax.pallas_kernels.dense import LOGITS_BUDGET
from kvjax.pallas_kernels.partial import feature_sum
from kvjax.pallas_kernels.slots import slot_logits, slot_mask
from kvjax.scorers._window import AbstractWindow
from kvjax.scorers.base import Asking, max_pool, protect_last
from kvjax.types import NEG_INF, Held, Scores


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RKV(AbstractWindow):
    """`mix * importance - (1 - mix) * redundancy`, both shares of what is held.

    Importance is the attention of the last queries to the tokens before them: the
    largest logit of the query group, a softmax over those tokens, the mean over the
    queries, a max pooling along the sequence. Redundancy is the softmax of the mean
    cosine of a key with all keys, where each key leaves out the newest of those that
    are like it.

    Attributes:
        window: last queries that vote; their own tokens are kept.
        kernel: width of the max pooling, odd.
        mix: weight of importance.
        threshold: cosine above which two keys are alike.

    Cost: every pair of held keys is multiplied, `S^2 D` per KV head, in blocks whose
    cosines fit `LOGITS_BUDGET`: memory is linear in `S`.

    Source: R-KV (2505.24133) section 3; the authors' `R1KV` and `cal_similarity`
    (window 8, kernel 7, threshold 0.5, direction "last"; mix 0.1 as in the paper and
    `run_math.py`).
    Deviations: a key that is like no other leaves out none, where the code then leaves
    out the first token held; behind a shared prefix, both terms are about the tokens
    that the cache itself holds.
    """

    window: Size = sized(8, short=8, recent=True)
    kernel: Kernel = 7
    mix: Share = 0.1
    threshold: Share = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ValueError(
                f"`kernel` must be odd, a token between its neighbours; got "
                f"{self.kernel}. Use {self.kernel + 1}."
            )

    def score(self, memory, held, counts):
        del counts
        held = held.cleared()
        importance = self._importance(memory.row, held)
        scores = self.mix * importance - (1 - self.mix) * self._redundancy(held)
        return protect_last(scores, held, self.window)

    def _importance(self, asking: Asking, held: Held) -> Scores:
        spec, there = held.spec, (asking.positions >= 0)[:, None, :, None]
        how = {"scale": spec.scale, "softcap": spec.softcap}
        logits = slot_logits(jnp.where(there, asking.q, 0), held.k, **how)
        before = self.before(held)
        mask = slot_mask(asking.positions, held.positions, spec.window)
        mask = mask & before[:, :, None]
        best = jnp.where(mask, jnp.max(logits, axis=2), jnp.finfo(jnp.float32).min)
        # A query that sees none of these tokens has equal logits, and pays nothing.
        paid = jnp.where(mask, jax.nn.softmax(best, axis=-1), 0.0)
        mean = jnp.sum(paid, axis=2) / self.window
        return jnp.where(before, self.pooled(mean, held, max_pool), 0.0)

    def _redundancy(self, held: Held) -> Scores:
        keys = held.k.astype(jnp.float32)
        square = feature_sum(keys * keys)[..., None]
        unit = keys / jnp.sqrt(jnp.maximum(square, 1e-16))
        total = _likeness(unit, held, self.threshold)
        count = jnp.sum(held.live, axis=-1, keepdims=True)
        mean = total / jnp.maximum(count, 1).astype(jnp.float32)
        return jax.nn.softmax(jnp.where(held.live, mean, NEG_INF), axis=-1)


def _likeness(
    unit: Float[Array, "B K S D"], held: Held, threshold: float
) -> Float[Array, "B K S"]:
    """Sum of each key's cosines with the others, but where they leave it out.

    Args:
        unit: keys of length 1; 0 in free slots.
        held: whose they are.
        threshold: above it, keys are alike, of which the newest is left out.
    """
    b, kv_heads, s, d = unit.shape
    chunk = int(max(1, min(s, LOGITS_BUDGET // (b * kv_heads * s))))
    blocks = -(-s // chunk)
    rows = jnp.pad(unit, [(0, 0), (0, 0), (0, blocks * chunk - s), (0, 0)])
    rows = jnp.moveaxis(rows.reshape(b, kv_heads, blocks, chunk, d), 2, 0)
    places, slots = held.positions[:, :, None], jnp.arange(s)

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        some, index = block
        cosines = jnp.einsum("BKCD,BKSD->BKCS", some, unit)
        cosines = jnp.where(index[:, None] == slots, 0.0, cosines)
        alike = cosines > threshold
        newest = jnp.max(jnp.where(alike, places, -1), axis=-1, keepdims=True)
        cosines = jnp.where(alike & (places == newest), 0.0, cosines)
        return total + jnp.sum(cosines, axis=2), None

    index = jnp.arange(blocks * chunk).reshape(blocks, chunk)
    return jax.lax.scan(add, jnp.zeros(unit.shape[:3]), (rows, index))[0]
