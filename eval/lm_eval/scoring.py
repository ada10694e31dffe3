"""Log-likelihoods of continuations, through the compressed cache of their contexts."""

import collections
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import KVCache
from kvjax.eval.lm_eval.reader import Ids, Reader, Split
from kvjax.models.finite import check_rows
from kvjax.models.padding import pad_rows

Score = tuple[float, bool]


@jax.jit
def _picked(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], counts: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Bool[Array, "B"], Bool[Array, "B"]]:
    """What is asked of each row's first `counts` targets.

    Returns:
        The sum of their log-probabilities; whether all are the likeliest tokens;
        whether the logits are finite.
    """
    inside = jnp.arange(targets.shape[1]) < counts[:, None]
    top = jnp.max(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logp = chosen - jax.nn.logsumexp(logits, axis=-1)
    same = (jnp.argmax(logits, axis=-1) == targets) | ~inside
    sound = jnp.isfinite(top) | ~inside
    return jnp.sum(jnp.where(inside, logp, 0.0), 1), same.all(1), sound.all(1)


def score(
    reader: Reader,
    asked: Sequence[tuple[Split, Ids]],
    tell: Callable[[int, Score], None],
) -> None:
    """Log-likelihood of each continuation, and whether greedy decoding gives it.

    A context is read and compressed once, whatever number of continuations it has: its
    cache is a value that each of them extends.

    Args:
        reader: of the model and the compression.
        asked: contexts and continuations, which have at least one token.
        tell: called with an index of `asked` and its score, in any order.
    """
    wanted: dict[Split, dict[Ids, list[int]]] = collections.defaultdict(dict)
    for index, (split, ids) in enumerate(asked):
        wanted[split].setdefault(ids, []).append(index)
    contexts = list(wanted.items())
    later = [(split, max(map(len, those)) - 1) for split, those in contexts]
    rows = min(reader.batch, len(contexts))
    for batch in reader.batches(later):
        splits = [contexts[i][0] for i in batch]
        logits, cache = reader.read(splits, max(later[i][1] for i in batch), rows)
        for turn in _turns([list(contexts[i][1]) for i in batch]):
            ids = [*turn, *[()] * (rows - len(turn))]
            sums, same = _one_each(reader, logits, cache, ids)
            for row, i in enumerate(batch):
                for index in contexts[i][1].get(turn[row], ()):
                    tell(index, (float(sums[row]), bool(same[row])))


def _turns(rows: Sequence[Sequence[Ids]]) -> Iterator[list[Ids]]:
    """The first continuation of each row, then the second; short ones together."""
    ordered = [sorted(row, key=len) for row in rows]
    for turn in range(max(map(len, ordered))):
        yield [row[turn] if turn < len(row) else () for row in ordered]


def _one_each(
    reader: Reader, logits: Float[Array, "B V"], cache: KVCache, rows: Sequence[Ids]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one continuation of each row, none where it is empty."""
    first, counts = pad_rows([row[:1] for row in rows], 1)
    found = [_picked(logits[:, None], jnp.asarray(first), jnp.asarray(counts))]
    for start, counts, seen, _ in reader.pieces(cache, [row[:-1] for row in rows]):
        after = [row[start + 1 :][: seen.shape[1]] for row in rows]
        targets, _ = pad_rows(after, seen.shape[1])
        found.append(_picked(seen, jnp.asarray(targets), counts))
    sums = np.sum([np.asarray(one[0], np.float64) for one in found], axis=0)
    same = np.all([np.asarray(one[1]) for one in found], axis=0)
    sound = np.all([np.asarray(one[2]) for one in found], axis=0)
    check_rows(reader.model.dtype, sound, " of a continuation")
    return sums, same
