"""Held-out accuracy through the real cache: prefill, compress, ask, decode."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kvjax.compress.config import Compression
from kvjax.eval.tasks import STOP, Item, Task, make_task
from kvjax.eval.tasks.base import before_stop
from kvjax.models import checks
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.generation import generate_from
from kvjax.models.inference import extend, prefill
from kvjax.train.config import Choice, TrainConfig
from kvjax.train.data import characters
from kvjax.train.duo import exported
from kvjax.train.sampling import samples_of
from kvjax.train.words import CHARACTERS, Words

FULL = "full"
"""What logs call the cache that nothing is done to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """Held-out items of one width, padded.

    Attributes:
        items: with the task that scores each.
        contexts, questions: `[B, T]` token ids, right-padded.
        context_lengths, question_lengths: `[B]`.
    """

    items: tuple[tuple[Task, Item], ...]
    contexts: Array
    context_lengths: Array
    questions: Array
    question_lengths: Array

    @property
    def reply_tokens(self) -> int:
        """Tokens of a reply, at most."""
        return max(task.max_new_tokens for task, _ in self.items)


class CachedEvaluation:
    """What a recipe decodes through the real cache at every evaluation.

    The cache is compressed between context and question.

    Args:
        config: the recipe.
        model: structure of the model.
        words: of the model.

    Raises:
        ValueError: a compression that does not fit the model or the items, by name.
    """

    def __init__(
        self, config: TrainConfig, model: DecoderConfig, words: Words = CHARACTERS
    ):
        self.config, self.words = config, words
        self.compressions: dict[str, Compression] = {FULL: Compression()}
        for made in samples_of(_choices(config), "cached.choices"):
            self.compressions |= {
                one.name: one.compression
                for one in made
                if one.compression != Compression()
            }
        self.questions: dict[int, Questions] = {}
        if not config.cached.items or not _tasks(config):
            return
        for stage in config.stages:
            width = max(stage.lengths)
            if width not in self.questions:
                self.questions[width] = questions(config, width, words)
                self._check(model, self.questions[width])

    def __call__(self, model: Decoder, step: int) -> dict[str, float]:
        """Mean score of the replies at a step, by compression; none without items."""
        if not self.questions:
            return {}
        stage = self.config.stages[self.config.stage_of(step)]
        asked = self.questions[max(stage.lengths)]
        model = exported(model)
        return {
            name: score(model, asked, c, self.words)
            for name, c in self.compressions.items()
        }

    def _check(self, model: DecoderConfig, asked: Questions) -> None:
        for name, c in self.compressions.items():
            try:
                checks.compression(model, c, asked.context_lengths)
            except ValueError as wrong:
                raise ValueError(
                    f"the evaluation through the cache cannot run under {name!r}: "
                    f"{wrong} Choose others with `cached.choices`, or set "
                    "`cached.items=0`."
                ) from None


def _choices(config: TrainConfig) -> tuple[Choice, ...]:
    if config.cached.choices:
        return config.cached.choices
    return tuple(choice.hardest for choice in config.sampling.choices)


def _tasks(config: TrainConfig) -> list[str]:
    return list(dict.fromkeys(s.task for s in config.data.sources if s.task))


def questions(config: TrainConfig, width: int, words: Words = CHARACTERS) -> Questions:
    """Held-out items of the recipe's tasks in turn, of about `width` tokens."""
    names = _tasks(config)
    count = config.cached.items
    made = []
    for i, name in enumerate(names):
        task, share = make_task(name), len(range(i, count, len(names)))
        if share:
            length = characters(task, words, width)
            made += [(task, item) for item in task.generate(0, share, length)]
    begin = np.asarray(words.begin, np.int32)
    contexts = [np.concatenate([begin, words.encode(item.context)]) for _, item in made]
    asked = [words.encode(item.question) for _, item in made]
    context, context_lengths = _padded(contexts)
    question, question_lengths = _padded(asked)
    return Questions(
        items=tuple(made),
        contexts=context,
        context_lengths=context_lengths,
        questions=question,
        question_lengths=question_lengths,
    )


def _padded(rows: list[np.ndarray]) -> tuple[Array, Array]:
    lengths = np.array([len(row) for row in rows], np.int32)
    out = np.zeros((len(rows), int(lengths.max())), np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return jnp.asarray(out), jnp.asarray(lengths)


def cached_replies(
    model: Decoder, asked: Questions, c: Compression, words: Words = CHARACTERS
) -> list[str]:
    """Greedy replies from the cache that `c` leaves of the contexts."""
    most = asked.reply_tokens
    room = asked.questions.shape[1] + most
    _, cache = prefill(
        model, asked.contexts, asked.context_lengths, c, max_new_tokens=room
    )
    logits, cache = extend(model, cache, asked.questions, asked.question_lengths)
    last = jnp.maximum(asked.question_lengths - 1, 0)[:, None, None]
    first = jnp.take_along_axis(logits, last, axis=1)[:, 0]
    stop = words.stops(STOP)
    made = generate_from(model, cache, first, max_new_tokens=most, stop_tokens=stop)
    tokens, lengths = np.asarray(made.tokens), np.asarray(made.lengths)
    return [
        _closed(words.decode(row[: min(n, task.max_new_tokens)].tolist()))
        for (task, _), row, n in zip(asked.items, tokens, lengths, strict=True)
    ]


def _closed(text: str) -> str:
    """Up to the stop character: a token may go on behind it."""
    reply = before_stop(text)
    return reply + STOP if len(reply) < len(text) else reply


def score(
    model: Decoder, asked: Questions, c: Compression, words: Words = CHARACTERS
) -> float:
    """Mean score of the replies."""
    given = cached_replies(model, asked, c, words)
    pairs = zip(asked.items, given, strict=True)
    return float(np.mean([task.score(item, reply) for (task, item), reply in pairs]))
