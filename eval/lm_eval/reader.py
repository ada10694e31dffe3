"""Reads contexts for the harness: prefill, compress, and what is behind the point."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import KVCache
from kvjax.compress.config import Compression
from kvjax.eval.lm_eval.tally import Tally
from kvjax.models import checks
from kvjax.models.decoder import Decoder
from kvjax.models.inference import extend, prefill
from kvjax.models.padding import PROMPT, bucket, pad_rows
from kvjax.models.prompts import NONE
from kvjax.models.reading import last_of
from kvjax.types import nbytes

MOST_LOGITS = 2**26
"""Numbers that are held at a time: 256 MiB."""

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True, order=True)
class Split:
    """A context, cut where it is compressed.

    Attributes:
        front: prefilled and compressed; at least one token.
        rest: read through the compressed cache; empty only where the context has a
            single token.
    """

    front: Ids
    rest: Ids


@jax.jit
def _newest(
    old: Float[Array, "B V"], seen: Float[Array, "B T V"], lengths: Int[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits of each row's last token, of which some rows have had no new one."""
    return jnp.where(lengths[:, None] > 0, last_of(seen, lengths), old)


class Reader:
    """Reads batches of contexts; a tally is kept.

    Args:
        model: what reads.
        c: what is done to the caches.
        batch: rows of a batch, at most.
        tally: what to count in.
    """

    def __init__(self, model: Decoder, c: Compression, batch: int, tally: Tally):
        self.model, self.c, self.batch, self.tally = model, c, batch, tally
        self._full: dict[tuple[int, int, int], int] = {}

    def check(self, splits: Sequence[Split]) -> None:
        """The compression suits all contexts, before any of them is read.

        Raises:
            ValueError: a budget is below what the method protects, say.
        """
        if not splits:
            return
        lengths = np.array([len(split.front) for split in splits], np.int32)
        try:
            checks.compression(self.model.config, self.c, jnp.asarray(lengths))
        except ValueError as wrong:
            raise ValueError(
                f"{wrong} Rows are contexts of the harness; {lengths.min()} to "
                f"{lengths.max()} of their tokens are compressed. More examples "
                "(num_fewshot) or other tasks make them longer."
            ) from wrong

    def batches(self, later: Sequence[tuple[Split, int]]) -> Iterator[list[int]]:
        """Indices of contexts that are read together, the longest first.

        Args:
            later: contexts, each with how many tokens its cache takes behind `rest`.
        """

        def size(index: int) -> tuple[int, int, int]:
            split, more = later[index]
            front = len(split.front)
            return bucket(front, PROMPT), room_for(len(split.rest) + more), front

        order = sorted(range(len(later)), key=size, reverse=True)
        for start in range(0, len(order), self.batch):
            yield order[start : start + self.batch]

    def read(
        self, splits: Sequence[Split], later: int, rows: int
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits of each context's last token, and the cache behind it.

        Args:
            splits: of different contexts.
            later: tokens that a cache takes behind `rest`, at most.
            rows: of the batch, filled up with the first one.
        """
        full = [*splits, *[splits[0]] * (rows - len(splits))]
        room = room_for(later + max(len(split.rest) for split in full))
        width = bucket(max(len(split.front) for split in full), PROMPT)
        tokens, lengths = pad_rows([split.front for split in full], width)
        tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
        logits, cache = prefill(
            self.model, tokens, lengths, self.c, max_new_tokens=room
        )
        size = cache.nbytes / rows
        self.tally.held(len(splits), size, self._bytes(rows, width, room) / rows)
        after = cache
        for piece in self.pieces(cache, [split.rest for split in full]):
            _, counts, seen, after = piece
            logits = _newest(logits, seen, counts)
        return logits, after

    def pieces(
        self, cache: KVCache, rows: Sequence[Ids]
    ) -> Iterator[tuple[int, Int[Array, "B"], Float[Array, "B T V"], KVCache]]:
        """New tokens of each row through the cache, so many that logits stay small.

        Yields:
            Where the piece starts, tokens of each row in it, their logits, and the
            cache behind it.
        """
        size = MOST_LOGITS // (len(rows) * self.model.config.vocab_size)
        size = max(16, 1 << max(0, size.bit_length() - 1))
        for start in range(0, max(map(len, rows)), size):
            part = [row[start : start + size] for row in rows]
            longest = max(map(len, part))
            tokens, counts = pad_rows(part, bucket(longest) if longest > 1 else 1)
            tokens, counts = jnp.asarray(tokens), jnp.asarray(counts)
            logits, cache = extend(self.model, cache, tokens, counts)
            yield start, counts, logits, cache

    def _bytes(self, rows: int, width: int, room: int) -> int:
        """Bytes of an uncompressed cache; nothing is computed."""
        key = (rows, width, room)
        if key not in self._full:
            tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
            lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)

            def caches(tokens: Array, lengths: Array) -> KVCache:
                read = (self.model, tokens, lengths, NONE)
                return prefill(*read, max_new_tokens=room)[1]

            self._full[key] = nbytes(jax.eval_shape(caches, tokens, lengths))
        return self._full[key]


def room_for(tokens: int) -> int:
    """What a cache has room for: powers of two, so that few programs are compiled."""
    return max(16, 1 << max(0, tokens - 1).bit_length())
