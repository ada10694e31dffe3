"""Rows of tokens: what becomes a line of a batch."""

import dataclasses

import numpy as np

from kvjax.eval.tasks import Episode
from kvjax.train.data.words import CHARACTERS, Words


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One row as tokens, with the loss weight of each.

    Attributes:
        tokens, weights, answers: one entry per token. In plain text everything is
            what the model shall say, so all of it counts as answer.
        context: tokens before the (last) question; 0: there is nothing before it.
        prompt: tokens before its answer. In plain text both are 0.
    """

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray
    context: int
    prompt: int

    def point(self, draw: float, visible: float) -> int:
        """Tokens before the compression point.

        Behind the question for `draw < visible`, else between context and question;
        behind the question also where nothing precedes it. In plain text anywhere in
        the middle half of the row.

        Args:
            draw: in [0, 1).
            visible: share of rows that are compressed behind their question.
        """
        if not self.prompt:
            return max(1, int(len(self.tokens) * (0.25 + 0.5 * draw)))
        return self.prompt if draw < visible or not self.context else self.context


def row(
    episode: Episode, *, context_weight: float, words: Words = CHARACTERS
) -> TokenRow:
    """`<bos>` context, then question and answer of each turn, `<eos>`.

    Answers weigh 1 each; the rest, mostly filler nobody can predict, `context_weight`.
    """
    texts = [(episode.context, False)]
    for turn in episode.turns:
        texts += [(turn.question, False), (turn.answer, True)]
    pieces = [words.encode(text) for text, _ in texts]
    tokens = np.concatenate([words.begin, *pieces, words.end]).astype(np.int32)
    flags = [
        np.full(len(piece), flag)
        for piece, (_, flag) in zip(pieces, texts, strict=True)
    ]
    ends = (np.zeros(len(part), bool) for part in (words.begin, words.end))
    answers = np.concatenate([next(ends), *flags, next(ends)])
    weights = np.where(answers, 1.0, context_weight).astype(np.float32)
    context = len(words.begin) + len(pieces[0])
    return TokenRow(
        tokens=tokens,
        weights=weights,
        answers=answers,
        context=context,
        prompt=context + len(pieces[1]),
    )
