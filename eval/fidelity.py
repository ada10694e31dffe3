"""Fidelity on any text: how far do the compressed cache's predictions move?

A context is read and compressed; the text that follows goes through the real cache,
teacher-forced, in one call or several. Its logits are compared with those that the
uncompressed cache gives.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import KVCache
from kvjax.compress.config import Compression
from kvjax.eval.groups import AbstractGroup, Answers
from kvjax.eval.reading import PromptReader
from kvjax.eval.text import Tokenizer
from kvjax.eval.timing import timed
from kvjax.fields import Checked, Positive, Range
from kvjax.files import read_text
from kvjax.models import checks
from kvjax.models.decoder import Decoder
from kvjax.models.finite import check_rows
from kvjax.models.inference import extend, prefill
from kvjax.narrow import narrow
from kvjax.places import expanded
from kvjax.types import LengthsLike, Tokens, TokensLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How a compressed cache predicts a continuation, per row.

    Attributes:
        nll: mean negative log-likelihood of the next token, in nats.
        kl: mean KL divergence of the compressed cache's predictions from the full
            one's, `KL(full || compressed)`, in nats.
        agreement: share of positions whose most likely token is the full cache's.
        resident_bytes: bytes of the cache per row, before the continuation.
    """

    nll: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray
    resident_bytes: float

    @property
    def ppl(self) -> np.ndarray:
        """Perplexity per row."""
        return np.exp(self.nll)


@narrow
def fidelity(
    model: Decoder, tokens: Tokens, context: int, c: Compression, *, calls: int = 1
) -> Fidelity:
    """Compare `c` with the uncompressed cache on rows of text.

    The first token behind the context is fed, not predicted: its logits are the
    uncompressed prompt's. So `T - context - 1` tokens are predicted.

    Args:
        model: a decoder.
        tokens: `[B, T]`, no padding.
        context: tokens read before compression, in `[1, T - 2]`.
        c: the compression.
        calls: the continuation is fed in this many calls, nearly equal.

    Raises:
        ValueError: see `kvjax.prefill`; a context that leaves nothing to predict;
            logits that are not finite.
    """
    full, compressed, resident = _both(model, tokens, context, c, calls)
    targets = jnp.asarray(tokens)[:, context + 1 :]
    nll, kl, agreement = map(np.asarray, compare(full, compressed, targets))
    check_rows(model.dtype, np.isfinite(nll), " on the text")
    return Fidelity(nll=nll, kl=kl, agreement=agreement, resident_bytes=resident)


@narrow
def told(
    model: Decoder, tokens: TokensLike, context: int, c: Compression, *, calls: int = 1
) -> dict[str, np.ndarray]:
    """`fidelity`, token by token: `[B, T - context - 1]` numbers by name.

    Args and errors are those of `fidelity`.

    Returns:
        `nll` and `kl` as there, `nll_full` of the uncompressed cache, and whether the
        most likely token `agrees`, 0 or 1.
    """
    full, compressed, _ = _both(model, tokens, context, c, calls)
    found = compare_tokens(full, compressed, jnp.asarray(tokens)[:, context + 1 :])
    numbers = {name: np.asarray(values) for name, values in found.items()}
    check_rows(model.dtype, np.isfinite(numbers["nll"]).all(axis=1), " on the text")
    return numbers


def _both(
    model: Decoder, tokens: TokensLike, context: int, c: Compression, calls: int
) -> tuple[Float[Array, "B M V"], Float[Array, "B M V"], float]:
    """Logits by the full cache and by the compressed one, and its bytes per row."""
    tokens, _ = checks.prompt(checks.model(model), tokens, None)
    checks.count("context", context, 1)
    check_split(context, tokens.shape[1] - context, calls)
    follow = tokens[:, context:]
    room = follow.shape[1]
    full, compressed, resident = None, None, 0.0
    for one in (Compression(), c):
        _, cache = prefill(model, tokens[:, :context], None, one, max_new_tokens=room)
        full, compressed = compressed, feed(model, cache, follow, calls)
        resident = cache.nbytes / tokens.shape[0]
    assert full is not None and compressed is not None
    return full, compressed, resident


def feed(
    model: Decoder, cache: KVCache, follow: Int[Array, "B N"], calls: int
) -> Float[Array, "B M V"]:
    """Logits of all but the last token of `follow`, fed through the cache."""
    parts = feeding(model, cache, follow, calls)
    return jnp.concatenate([logits for _, logits in parts], axis=1)


def feeding(
    model: Decoder,
    cache: KVCache,
    follow: TokensLike,
    calls: int,
    lengths: LengthsLike | None = None,
) -> Iterator[tuple[slice, Float[Array, "B T V"]]]:
    """`feed` call by call, for those who cannot hold all logits at once.

    Args:
        model: a decoder.
        cache: its cache, with room for what is fed.
        follow: `[B, N]`; all but the last token is fed.
        calls: how many, of nearly equal width.
        lengths: `[B]` tokens that a row feeds; None: all but the last.

    Yields:
        The columns of `follow` that a call fed, and their logits; anything behind a
        row's length.
    """
    ends = np.linspace(0, follow.shape[1] - 1, calls + 1).round().astype(int).tolist()
    for start, end in itertools.pairwise(ends):
        some = None
        if lengths is not None:
            some = jnp.clip(jnp.asarray(lengths) - start, 0, end - start)
        logits, cache = extend(model, cache, follow[:, start:end], some)
        yield slice(start, end), logits


@jax.jit
def compare(
    full: Float[Array, "B M V"],
    compressed: Float[Array, "B M V"],
    targets: Int[Array, "B M"],
) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Mean NLL, KL and top-1 agreement of each row."""
    by_token = compare_tokens(full, compressed, targets)
    nll, kl, same = (by_token[name].mean(1) for name in ("nll", "kl", "agrees"))
    return nll, kl, same


@jax.jit
def compare_tokens(
    full: Float[Array, "B M V"],
    compressed: Float[Array, "B M V"],
    targets: Int[Array, "B M"],
) -> dict[str, Float[Array, "B M"]]:
    """NLL of each token, that of the full cache, KL and top-1 agreement (0 or 1)."""
    p, q = jax.nn.log_softmax(full), jax.nn.log_softmax(compressed)
    nll, before = (
        -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
        for logs in (q, p)
    )
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    return {
        "nll": nll,
        "nll_full": before,
        "kl": kl,
        "agrees": same.astype(jnp.float32),
    }


def check_split(context: int, continuation: int, calls: int) -> None:
    """There is something to read and something to predict."""
    checks.count("context", context, 1)
    checks.count("continuation", continuation, 2)
    checks.count("calls", calls, 1)
    if calls > continuation - 1:
        raise ValueError(
            f"{continuation - 1} tokens cannot be fed in {calls} calls. Lower `calls`."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask(Checked):
    """The fields of task `text`.

    Attributes:
        path: a text file, UTF-8.
        context: tokens read before compression.
        continuation: tokens behind it; all but the first are predicted.
        calls: see `fidelity`.
    """

    path: str
    context: Positive = 256
    continuation: Annotated[int, Range(2)] = 128
    calls: Positive = 1

    def __post_init__(self):
        super().__post_init__()
        check_split(self.context, self.continuation, self.calls)

    def windows(self, tokenizer: Tokenizer, count: int) -> np.ndarray:
        """`[count, context + continuation]` tokens, spread evenly over the file.

        Raises:
            ValueError: no such file, not UTF-8, or too short for `count` windows.
        """
        path = expanded(self.path)
        text = read_text(path)
        tokenizer.check(f"task 'text' ({path})", [text])
        tokens = tokenizer.encode(text)
        own = self.context + self.continuation - len(tokenizer.prefix)
        if own < 2 or len(tokens) < count * own:
            raise ValueError(
                f"task 'text': {path} has {len(tokens)} tokens; {count} windows of "
                f"{own} need {count * own}. Lower `items`, or give a longer file."
            )
        stride = len(tokens) // count
        rows = [tokens[i * stride : i * stride + own] for i in range(count)]
        return np.array([[*tokenizer.prefix, *row] for row in rows], np.int32)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGroup(AbstractGroup):
    """Windows of a text.

    Attributes:
        text: the task's fields.
        follow: `[N, continuation]` tokens behind each context.
    """

    text: TextTask
    follow: np.ndarray
    _reference: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    def asks_for(self):
        yield np.asarray(self.follow, "<i4").tobytes()

    @property
    def room(self):
        return self.text.continuation

    def shown(self, item):
        return self.tokenizer.decode(self.prompts[item]), ""

    def answer(self, reader, cache, prompt, index):
        del prompt
        follow = jnp.asarray(self.follow[index])
        full = self._full(reader, index, follow)
        fed = timed(lambda: feed(reader.model, cache, follow, self.text.calls))
        columns = [np.asarray(x) for x in compare(full, fed.value, follow[:, 1:])]
        check_rows(reader.model.dtype, np.isfinite(columns[0]), " on the text")
        rows: Sequence[Any] = list(zip(*columns, strict=True))[: self.scored(index)]
        items = tuple(
            {"nll": float(nll), "kl": float(kl), "agrees": float(agreement)}
            for nll, kl, agreement in rows
        )
        told = None
        if index[0] == 0:  # see `kvjax.eval.maps`
            first = compare_tokens(full[:1], fed.value[:1], follow[:1, 1:])
            told = {name: np.asarray(row[0]) for name, row in first.items()}
        # Teacher-forced in large steps: there is no time per token.
        return [Answers(items=items, compile_s=fed.compile_s, told=told)]

    def _full(
        self, reader: PromptReader, index: np.ndarray, follow: jax.Array
    ) -> jax.Array:
        """The uncompressed cache's logits; those of one batch are held at a time."""
        first = int(index[0])
        if first not in self._reference:
            none = Compression()
            prompt = reader.read(self, none, index).value
            cache = prompt.compress(none, max_new_tokens=self.room)
            self._reference.clear()
            self._reference[first] = feed(reader.model, cache, follow, self.text.calls)
        return self._reference[first]
