"""Rows of tokens: what becomes a line of a batch."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One row as tokens, with the loss weight of each.

    Attributes:
        tokens, weights, answers: one entry per token. In plain text everything is
            what the model shall say, so all of it counts as answer.
        context: tokens before the (last) question; 0: there is nothing before it.
        prompt: tokens up to the end of that question; what stands between it and the
            answer may follow. In plain text both are 0.
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
