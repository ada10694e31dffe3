"""Contexts cut where they are compressed, and texts as contexts and continuations.

Prefill gives logits of all its tokens, and none of them knows the compression. So the
tokens of a whole text (`loglikelihood_rolling`) are scored in pieces, each through the
compressed cache of what is in front of it in the same window. A piece is as long as all
in front of it: about two passes over a window in all, and every token sees what it sees
without a compression, half of it or more compressed. The first piece has nothing
compressed in front; its tokens are counted apart.
"""

import functools
from collections.abc import Iterator, Sequence

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvjax.eval.lm_eval.reader import Ids, Split
from kvjax.eval.lm_eval.rule import AbstractRule
from kvjax.eval.lm_eval.tally import Tally
from kvjax.eval.lm_eval.words import Words
from kvjax.messages import shown


class Splitter:
    """Cuts contexts and texts.

    Args:
        words: of the model.
        rule: where a context is compressed.
        most: tokens that the model reads.
        first: where the first piece of a window ends.
        compresses: whether there is a compression.
        tally: what to count in.
    """

    def __init__(
        self,
        *,
        words: Words,
        rule: AbstractRule,
        most: int,
        first: int,
        compresses: bool,
        tally: Tally,
    ):
        self.words, self.rule, self.most, self.first = words, rule, most, first
        self.compresses, self.tally = compresses, tally

    def split(self, index: int, text: str, ids: Sequence[int], most: int) -> Split:
        """A context cut at its left, and where it is compressed.

        Args:
            index: of the request, for messages.
            text: the context.
            ids: its tokens.
            most: how many of them are read.

        Raises:
            ValueError: the context has no point as the rule wants it.
        """
        ids = tuple(ids) or (self.words.begin,)
        if len(ids) > most:
            self.tally.cut(len(ids), most)
        held = min(len(ids), most)
        try:
            rest = self._rest(text, ids, held) if text else 0
        except ValueError as wrong:
            raise ValueError(
                f"the context of request {index} of the harness ({shown(text)}) {wrong}"
            ) from None
        self.tally.single += held == 1
        kept = ids[-held:]
        return Split(front=kept[: held - rest], rest=kept[held - rest :])

    @functools.lru_cache(4096)  # noqa: B019 - several requests share a context
    def _rest(self, text: str, ids: Ids, held: int) -> int:
        return self.rule.rest(text, ids, held, self.words.encode)

    def windows(self, text: str) -> list[tuple[Split, Ids]]:
        """A text as contexts and what follows them: each of its tokens once."""
        windows = get_rolling_token_windows(
            token_list=self.words.encode(text),
            prefix_token=self.words.begin,
            max_seq_len=self.most,
            context_len=1,
        )
        out: list[tuple[Split, Ids]] = []
        for context, tokens in map(make_disjoint_window, windows):
            self.tally.rolled += len(tokens)
            # Without a compression a window is one piece.
            first = self.first if self.compresses else len(context) + len(tokens)
            for front, later in pieces(tuple(context), tuple(tokens), first):
                plain = len(front) < self.first
                self.tally.plain += len(later) * (plain or not self.compresses)
                at = 1 if plain else len(front) - 1
                out.append((Split(front=front[:at], rest=front[at:]), later))
        return out


def pieces(context: Ids, tokens: Ids, first: int) -> Iterator[tuple[Ids, Ids]]:
    """Contexts and continuations; together they score each of `tokens` once.

    Args:
        context: what the window's tokens follow, at least one token.
        tokens: that are scored.
        first: the first piece ends in front of this token of the window, if it has
            that many.
    """
    whole = (*context, *tokens)
    start = len(context)
    while start < len(whole):
        stop = min(len(whole), max(first, 2 * start))
        yield whole[:start], whole[start:stop]
        start = stop
