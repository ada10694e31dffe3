"""Training rows from the tasks: a weighted mixture, generated as it is needed.

Batch `i` is a pure function of the seed and `i`, so a resumed run sees the same data.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np

from kvjax.eval.tasks import TRAIN, Episode, Task, make_task, stream
from kvjax.train.config import DataConfig, Source, Stage
from kvjax.train.objective import Batch
from kvjax.train.tokenizer import BOS, EOS, PAD, encode

LATER = 256
"""`Batch.later` is a multiple of this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One episode as tokens, with the loss weight of each.

    Attributes:
        tokens, weights, answers: one entry per token.
        context: tokens before the first question.
        prompt: tokens before the first answer.
    """

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray
    context: int
    prompt: int


def row(episode: Episode, *, context_weight: float) -> Row:
    """`<bos>` context, then question and answer of each turn, `<eos>`.

    Answers weigh 1 each; the rest, mostly filler nobody can predict, `context_weight`.
    """
    texts = [(episode.context, False)]
    for turn in episode.turns:
        texts += [(turn.question, False), (turn.answer, True)]
    pieces = [encode(text) for text, _ in texts]
    tokens = np.concatenate([[BOS], *pieces, [EOS]]).astype(np.int32)
    flags = [
        np.full(len(piece), flag)
        for piece, (_, flag) in zip(pieces, texts, strict=True)
    ]
    answers = np.concatenate([[False], *flags, [False]])
    weights = np.where(answers, 1.0, context_weight).astype(np.float32)
    context = 1 + len(pieces[0])
    return Row(
        tokens=tokens,
        weights=weights,
        answers=answers,
        context=context,
        prompt=context + len(pieces[1]),
    )


def pack(
    rows: Sequence[Row],
    width: int,
    points: Sequence[int] | None = None,
    step: int = 0,
) -> Batch:
    """Right-padded `[B, width]` arrays; a row that is too long is an error.

    `points` are the rows' compression points; None: behind each context.
    """
    tokens = np.full((len(rows), width), PAD, np.int32)
    weights = np.zeros((len(rows), width), np.float32)
    answers = np.zeros((len(rows), width), bool)
    for i, one in enumerate(rows):
        n = len(one.tokens)
        if n > width:
            raise ValueError(
                f"Row {i} has {n} tokens, the batch is {width} wide. Generate "
                f"episodes of at most {width - 2} characters."
            )
        tokens[i, :n], weights[i, :n] = one.tokens, one.weights
        answers[i, :n] = one.answers
    if points is None:
        points = [one.context for one in rows]
    arrays = (tokens, weights, answers, np.asarray(points, np.int32), np.int32(step))
    names = ("tokens", "weights", "answers", "prompt_lengths", "step")
    later = max(len(one.tokens) - at for one, at in zip(rows, points, strict=True))
    fields = dict(zip(names, map(jnp.asarray, arrays), strict=True))
    # A multiple, since every value compiles a program.
    return Batch(**fields, later=min(width, -(-later // LATER) * LATER))


class Mixture:
    """Batches of a weighted mixture of tasks.

    Args:
        config: sources and their weights.
        stages: how many rows of which width, when.
        seed: of the training stream; held-out items never share it.
        visible: share of rows that are compressed behind their first question; the
            others before it.
    """

    def __init__(
        self,
        config: DataConfig,
        stages: Sequence[Stage],
        seed: int,
        visible: float = 0.0,
    ):
        self.config = config
        self.visible = visible
        self.stages = tuple(stages)
        self.seed = seed
        self.mixtures = [
            _tasks(stage.sources or config.sources) for stage in self.stages
        ]

    def batch(self, step: int) -> Batch:
        """The batch of one step; all its rows have one width."""
        rng = stream(TRAIN, "mixture", self.seed, step)
        stage, tasks = self._stage(step)
        width = draw(rng, stage.lengths)
        rows = [
            self._row(draw(rng, tasks), rng, width)
            for _ in range(max(1, stage.tokens_per_step // width))
        ]
        # A stream of its own: rows do not depend on where they are compressed.
        coin = stream(TRAIN, "visibility", self.seed, step)
        points = [
            one.prompt if coin.random() < self.visible else one.context for one in rows
        ]
        return pack(rows, width, points, step)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Batches `first .. last - 1`, the next one prepared in the background."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.batch, first)
            for step in range(first, last):
                batch = ahead.result()
                if step + 1 < last:
                    ahead = pool.submit(self.batch, step + 1)
                yield batch

    def _row(self, task: Task, rng: random.Random, width: int) -> Row:
        # Wide rows ask many questions: answers are what teaches.
        most = max(1, self.config.turns * width // 128) if task.multi_turn else 1
        episode = task.episode(rng, width - 2, turns=rng.randint(1, most))
        return row(episode, context_weight=self.config.context_weight)

    def _stage(self, step: int) -> tuple[Stage, dict[Task, float]]:
        for stage, tasks in zip(self.stages, self.mixtures, strict=True):
            if step < stage.steps:
                return stage, tasks
            step -= stage.steps
        return self.stages[-1], self.mixtures[-1]


def _tasks(sources: Sequence[Source]) -> dict[Task, float]:
    """Each task and its weight; a task named twice weighs both."""
    weights: dict[Task, float] = {}
    for source in sources:
        task = make_task(source.task, **source.fields)
        weights[task] = weights.get(task, 0.0) + source.weight
    return weights


def draw[K](rng: random.Random, weights: dict[K, float]) -> K:
    """A key, with probability proportional to its weight."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]
