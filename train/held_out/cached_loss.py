"""Held-out loss through the real cache: prefill, compress, feed the rest of the row."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kvjax.compress.config import Compression
from kvjax.eval.fidelity import feeding
from kvjax.eval.tasks import HELD_OUT, stream
from kvjax.models.decoder import Decoder
from kvjax.models.finite import check_rows
from kvjax.models.inference import prefill
from kvjax.models.padding import pad_rows
from kvjax.train.data.readers import RowReader
from kvjax.train.data.rows import TokenRow
from kvjax.train.objectives.losses import LOGITS
from kvjax.train.recipe.output import CACHED_LOSS

PASS_TOKENS = 16384
"""Tokens of the rows that go through the model together, unless one row has more."""

CALL_TOKENS = 512
"""Tokens of a row that are fed in one call, at most.

A call holds weights of all its queries over the tail, which has room for what follows.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutRows:
    """Held-out rows of one source, cut at their compression points.

    Attributes:
        prompts: `[N, P]` tokens before the point, right-padded.
        prompt_lengths: `[N]`.
        follow: `[N, F]` tokens behind it, right-padded.
        follow_lengths: `[N]`.
        weights: `[N, F]` what each of these counts as a target.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    follow: np.ndarray
    follow_lengths: np.ndarray
    weights: np.ndarray

    def groups(self) -> Iterator["CutRows"]:
        """Parts of at most `PASS_TOKENS`, all of one shape: they share a program."""
        rows = len(self.prompts)
        width = self.prompts.shape[1] + self.follow.shape[1]
        most = max(1, PASS_TOKENS // width)
        size = max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)
        fields = [field.name for field in dataclasses.fields(self)]
        for first in range(0, rows, size):
            part = slice(first, first + size)
            yield CutRows(**{name: getattr(self, name)[part] for name in fields})


def cut(rows: Sequence[TokenRow], points: Sequence[int]) -> CutRows:
    """Rows cut in front of their tokens number `points`.

    The first token behind the point is fed and does not count: the logits that predict
    it are the uncompressed prompt's.
    """
    pairs = list(zip(rows, points, strict=True))
    prompts, prompt_lengths = pad_rows([one.tokens[:at] for one, at in pairs])
    follow, follow_lengths = pad_rows([one.tokens[at:] for one, at in pairs])
    weights, _ = pad_rows([one.weights[at:] for one, at in pairs], dtype=np.float32)
    weights[:, :1] = 0.0
    return CutRows(
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        follow=follow,
        follow_lengths=follow_lengths,
        weights=weights,
    )


def held_out_rows(
    readers: Mapping[str, RowReader], items: int, width: int, seed: int
) -> tuple[CutRows, ...]:
    """The first rows of each held-out split, `items` in all, dealt to them in turn.

    The same at each call. They are compressed before their last question, plain text
    anywhere in the middle half of the row.

    Args:
        readers: of the splits, by name.
        items: rows of all of them.
        width: of the rows, at most.
        seed: of the points in plain text.

    Raises:
        ValueError: no token of a source's rows is predicted from the cache.
    """
    made = []
    for number, (name, reader) in enumerate(readers.items()):
        share = range(number, items, len(readers))
        if not share:
            continue
        reader.reset()
        rows = [reader.take(width) for _ in share]
        draws = [stream(HELD_OUT, f"point/{name}", seed, i).random() for i in share]
        points = [one.point(draw, 0.0) for one, draw in zip(rows, draws, strict=True)]
        found = cut(rows, points)
        if not found.weights.any():
            longest = max(len(one.tokens) for one in rows)
            raise ValueError(
                f"{reader.name}: its held-out rows have {longest} tokens at most, and "
                "none with a loss that is predicted from the cache: the first one "
                "behind the compression point is not. Give it longer records, wider "
                "rows (`lengths` of the stages), or set `cached.items=0`."
            )
        made.append(found)
    return tuple(made)


def loss(model: Decoder, rows: CutRows, c: Compression) -> float:
    """Mean loss of the tokens behind the points, from the cache that `c` leaves.

    In nats, over the tokens that count, by their weights.
    """
    total = sum(_cost(model, part, c) for part in rows.groups())
    check_rows(model.dtype, np.isfinite([float(total)]), " on held-out rows")
    return float(total) / float(rows.weights.sum())


def _cost(model: Decoder, rows: CutRows, c: Compression) -> Array:
    count, width = rows.follow.shape
    held = max(1, LOGITS // (count * model.config.vocab_size))
    calls = -(-(width - 1) // min(CALL_TOKENS, held))
    # Calls of one width: one program.
    more = [(0, 0), (0, -(width - 1) % calls)]
    follow, weights = np.pad(rows.follow, more), np.pad(rows.weights, more)
    room = follow.shape[1] - 1
    _, cache = prefill(model, rows.prompts, rows.prompt_lengths, c, max_new_tokens=room)
    lengths = np.maximum(rows.follow_lengths - 1, 0)
    targets, counted = follow[:, 1:], weights[:, 1:]
    parts = feeding(model, cache, follow, calls, lengths)
    costs = [_sum(logits, targets[:, at], counted[:, at]) for at, logits in parts]
    return jnp.stack(costs).sum()


@jax.jit
def _sum(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(jnp.where(weights > 0, each * weights, 0.0))


def mean_loss(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What `keep.metric` may ask for: the loss, averaged over the compressions."""
    losses = [values["loss"] for values in found.values() if "loss" in values]
    return {CACHED_LOSS: sum(losses) / len(losses)} if losses else {}
