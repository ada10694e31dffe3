"""Held-out accuracy and loss through the real cache: what a recipe asks of it.

Tasks: prefill, compress, ask, decode. Datasets: see `kvjax.train.held_out.cached_loss`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kvjax.compress.config import Compression
from kvjax.eval.replies import greedy_replies
from kvjax.eval.tasks import Item, Task, make_task
from kvjax.models import checks
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.inference import prefill
from kvjax.models.padding import pad_rows
from kvjax.train.data.readers import RowReader
from kvjax.train.data.sampling import samples_of
from kvjax.train.data.tasks import TaskRows
from kvjax.train.data.words import CHARACTERS, Words
from kvjax.train.held_out.cached_loss import CutRows, held_out_rows, loss
from kvjax.train.objectives.duo import exported
from kvjax.train.recipe import CompressionChoice, TrainConfig
from kvjax.train.recipe.output import CACHED_LOSS

FULL = "full"
"""What logs call the cache that nothing is done to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutQuestions:
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
    """What a recipe sends through the real cache at every evaluation.

    The cache is compressed between context and question; see `held_out_rows` for plain
    text. Items and rows are chosen here, once, so that evaluations compare.

    Args:
        config: the recipe.
        model: structure of the model.
        words: of the model.
        held_out: readers of the datasets' held-out splits, by name.

    Raises:
        ValueError: a compression that does not fit the model or the items, by name;
            rows with nothing to predict from the cache, by source; a `keep.metric`
            that nothing here measures.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: DecoderConfig,
        words: Words = CHARACTERS,
        held_out: Mapping[str, RowReader] = MappingProxyType({}),
    ):
        self.config, self.words = config, words
        self.compressions: dict[str, Compression] = {FULL: Compression()}
        for made in samples_of(_choices(config), "cached.choices"):
            self.compressions |= {
                one.name: one.compression
                for one in made
                if one.compression != Compression()
            }
        self.questions: dict[int, HeldOutQuestions] = {}
        self.rows: dict[int, tuple[CutRows, ...]] = {}
        items = config.cached.items
        for width in dict.fromkeys(max(s.lengths) for s in config.stages if items):
            if config.data.held_out_tasks:
                self.questions[width] = questions(config, width, words)
                self._check(model, self.questions[width].context_lengths)
            if held_out:
                rows = held_out_rows(held_out, items, width, config.seed)
                self.rows[width] = rows
                for one in rows:
                    self._check(model, jnp.asarray(one.prompt_lengths))
        if config.keep.best and config.keep.metric == CACHED_LOSS and not self.rows:
            raise ValueError(
                f"`keep.metric` is {CACHED_LOSS!r}, which nothing measures: it needs "
                "`cached.items` and a dataset with a `held_out` split; got "
                f"{items} items and {'such a' if held_out else 'no such'} dataset. "
                "Give both, or take `keep.metric=answer_loss`."
            )

    def __call__(self, model: Decoder, step: int) -> dict[str, dict[str, float]]:
        """What was measured at a step, by compression; nothing without items.

        `accuracy` is the mean score of the replies, `loss` that of held-out rows,
        averaged over their sources.
        """
        if not self.questions and not self.rows:
            return {}
        width = max(self.config.stages[self.config.stage_of(step)].lengths)
        model = exported(model)
        found: dict[str, dict[str, float]] = {name: {} for name in self.compressions}
        for name, c in self.compressions.items():
            if asked := self.questions.get(width):
                found[name]["accuracy"] = score(model, asked, c, self.words)
            if rows := self.rows.get(width):
                losses = [loss(model, one, c) for one in rows]
                found[name]["loss"] = float(np.mean(losses))
        return found

    def _check(self, model: DecoderConfig, lengths: Array) -> None:
        for name, c in self.compressions.items():
            try:
                checks.compression(model, c, lengths)
            except ValueError as wrong:
                raise ValueError(
                    f"the evaluation through the cache cannot run under {name!r}: "
                    f"{wrong} Choose others with `cached.choices`, or set "
                    "`cached.items=0`."
                ) from None


def _choices(config: TrainConfig) -> tuple[CompressionChoice, ...]:
    if config.cached.choices:
        return config.cached.choices
    return tuple(choice.hardest for choice in config.sampling.choices)


def questions(
    config: TrainConfig, width: int, words: Words = CHARACTERS
) -> HeldOutQuestions:
    """Held-out items of the recipe's tasks in turn, of about `width` tokens."""
    kept = config.data.held_out_tasks
    tasks = [make_task(name, **fields) for name, fields in kept.items()]
    count = config.cached.items
    made, contexts, asked = [], [], []
    for i, task in enumerate(tasks):
        rows, share = TaskRows(task, words), len(range(i, count, len(tasks)))
        for item in rows.held_out(share, width) if share else ():
            made.append((rows.task, item))
            one = rows.row(item.alone)
            first = int(np.argmax(one.answers))
            contexts.append(one.tokens[: one.context])
            asked.append(one.tokens[one.context : first])
    context, context_lengths = map(jnp.asarray, pad_rows(contexts))
    question, question_lengths = map(jnp.asarray, pad_rows(asked))
    return HeldOutQuestions(
        items=tuple(made),
        contexts=context,
        context_lengths=context_lengths,
        questions=question,
        question_lengths=question_lengths,
    )


def cached_replies(
    model: Decoder, asked: HeldOutQuestions, c: Compression, words: Words = CHARACTERS
) -> list[str]:
    """Greedy replies from the cache that `c` leaves of the contexts."""
    most = asked.reply_tokens
    room = asked.questions.shape[1] + most
    logits, cache = prefill(
        model, asked.contexts, asked.context_lengths, c, max_new_tokens=room
    )
    given = greedy_replies(
        model,
        cache,
        logits,
        (asked.questions, asked.question_lengths),
        max_new_tokens=most,
        stop_tokens=sorted(
            {token for task, _ in asked.items for token in words.stops(task.stop)}
        ),
    )
    return [
        task.cut(words.decode(row[: task.max_new_tokens].tolist()))
        for (task, _), row in zip(asked.items, given.tokens, strict=True)
    ]


def score(
    model: Decoder, asked: HeldOutQuestions, c: Compression, words: Words = CHARACTERS
) -> float:
    """Mean score of the replies."""
    given = cached_replies(model, asked, c, words)
    pairs = zip(asked.items, given, strict=True)
    return float(np.mean([task.score(item, reply) for (task, item), reply in pairs]))
