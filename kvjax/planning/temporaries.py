"""Memory beside weights and cache, by formulas: for chips whose compiler is not asked.

They count the arrays that are alive where a layer is widest, in the model's dtype
unless said otherwise, and are meant as upper estimates of what a compiler that is short
of memory comes to. One that has more to spare takes more, for copies of weights say
(docs/plan.md has both).
`B` rows, `T` tokens, `E` width, `I` feed-forward width, `H` and `K` heads, `D` head
dim, `V` vocabulary, `s` bytes of a number.

    prefill   max(feed-forward, attention) + moved + surveyed + logits + one layer
      feed-forward   B T s (2 I + 3 E)               gate, up; stream, its sum, normed
      attention      B T (s (2 E + H D + 2 K D) + 4 H D) + 12 C   q, k, v; f32 output
      moved          B T s 2 K D                     if tokens are dropped: a layer's
      surveyed       L B T s 2 K D                   if all layers are looked at first
      logits         4 B V
    in chunks: T is that of a chunk, and `HELD` times what a layer holds is moved
    decode    B (8 V + s (2 I + 3 E) + 8 H D) + 8 B K D W + one layer + laid out anew

`C` is the logits that attention has at a time, three of which are alive (with their
mask and weights); `W` the slots decoded at a time (`cache.blocks.BLOCK`). One layer is
the weights of one, which a CPU copies, and a TPU or GPU does not. On a TPU scales and
zeros, whose rows are shorter than its registers are wide, are laid out anew for the
decode kernel: `ANEW` times their bytes, which is measured.
"""

import dataclasses
import math

from kvjax.cache.blocks import BLOCK
from kvjax.compress.config import Compression
from kvjax.compress.observe import wants_mass
from kvjax.models.config import DecoderConfig
from kvjax.pallas_kernels import dense, held_blocks

ANEW = 2.4
"""Of libtpu 0.0.51 for v5e: 2.0 (kivi_4bit) and 2.3 (snapkv_kivi), 131,072 tokens."""

HELD = 3
"""What a layer holds as it was, with the chunk behind it, and as it is then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widths:
    """What the formulas know of a model, or of one chip's share of it.

    Attributes:
        config: of the model or the share.
        itemsize: bytes of a number.
        layer: bytes of the weights of one layer.
    """

    config: DecoderConfig
    itemsize: int
    layer: int

    def prefill(
        self, c: Compression, batch: int, tokens: int, between: int, kind: str
    ) -> int:
        """Bytes while a prompt is read; see the head of this file.

        Args:
            c: what is done to the cache.
            batch: rows.
            tokens: of each.
            between: bytes that are held from chunk to chunk, if it is read so.
            kind: `cpu`, `tpu` or `gpu`.
        """
        given, s = self.config, self.itemsize
        if c.schedule.chunk is not None:
            tokens = min(tokens, c.schedule.chunk)
        e, wide = given.hidden_size, given.intermediate_size
        heads = given.num_heads * given.head_dim
        pairs = 2 * given.num_kv_heads * given.head_dim
        rows = batch * tokens
        feeding = rows * s * (2 * wide + 3 * e)
        attending = rows * (s * (2 * e + heads + pairs) + 4 * heads)
        attending += 12 * self._logits(c, batch, tokens, kind)
        moved = rows * s * pairs if c.scores else 0
        moved += HELD * between // given.num_layers
        surveyed = rows * s * pairs * given.num_layers if c.surveys else 0
        logits = 4 * batch * given.vocab_size
        copied = self.layer if kind == "cpu" else 0
        return max(feeding, attending) + moved + surveyed + logits + copied

    def _logits(self, c: Compression, batch: int, tokens: int, kind: str) -> int:
        """Logits that attention has at a time."""
        each = batch * self.config.num_heads * tokens
        if c.prefill.causal and not wants_mass(c):
            block = held_blocks.CPU_BLOCK if kind == "cpu" else held_blocks.BLOCK
            return min(max(block, held_blocks.QUERIES * each // batch), each * tokens)
        return dense.query_chunk(tokens, each) * each

    def decode(self, batch: int, scales: int, kind: str) -> int:
        """Bytes of a decode step, likewise.

        Args:
            batch: rows.
            scales: bytes of what decodes the cache's codes.
            kind: `cpu`, `tpu` or `gpu`.
        """
        given, s = self.config, self.itemsize
        row = 8 * given.vocab_size + 8 * given.num_heads * given.head_dim
        row += s * (2 * given.intermediate_size + 3 * given.hidden_size)
        block = 8 * given.num_kv_heads * given.head_dim * BLOCK
        own = {"cpu": self.layer, "tpu": math.ceil(ANEW * scales)}
        return batch * (row + block) + own.get(kind, 0)
