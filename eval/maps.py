"""What `maps/` holds of a cell: the first item of each depth, token by token.

Always the positions that were kept. Of the very first item also what costs more to
know: when each token left a cache that evicts while decoding, how far each prediction
moved on text, and what each token is worth where the oracle is evaluated.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from kvjax.cache import KVCache
from kvjax.compress.config import Compression
from kvjax.eval.departures import Departures, Watch, evicts_later, read_on
from kvjax.eval.fidelity import TextGroup
from kvjax.eval.groups import AbstractGroup, Answers
from kvjax.eval.pieces import token_pieces
from kvjax.eval.questions import QuestionGroup
from kvjax.models.decoder import Decoder
from kvjax.models.padding import pad_rows
from kvjax.models.prompts import CompressedPrompt, Prompt
from kvjax.models.slopes import gate_slopes
from kvjax.scorers import Oracle

if TYPE_CHECKING:  # what reads groups
    from kvjax.eval.plan import Cell

MAP_TOKENS = 8192
"""Longest prompt whose kept positions are written: a map lists all of them."""

MOST_STEPS = 64
"""How often a cache that evicts while decoding is looked at."""

MOST_LOGITS = 2**26
"""Tokens times vocabulary up to which tokens are weighed: the slopes hold all logits
several times over."""


class MapMaker:
    """Makes the maps of an evaluation.

    Args:
        model: what is evaluated.
        keeps: its budgets.
    """

    def __init__(self, model: Decoder, keeps: Sequence[float]):
        self.model = model
        # The one that a report shows: watching compiles a step of one token.
        self.watched = {None, sorted(keeps)[len(keeps) // 2]}
        self._worth: tuple[AbstractGroup | None, Any] = (None, None)

    def made(
        self,
        group: AbstractGroup,
        c: Compression,
        keep: float | None,
        cache: KVCache,
        prompt: Prompt | CompressedPrompt,
        answers: Answers,
        index: np.ndarray,
    ) -> dict[int, dict[str, Any]]:
        """By item, what the maps of a batch hold beside its texts.

        Args:
            group: whose prompts they are.
            c: what was done to them.
            keep: its budget in the evaluation.
            cache: of the prompts, compressed.
            prompt: what it was made of.
            answers: what came of it.
            index: which prompts.
        """
        items = [int(item) for item in index[: group.scored(index)]]
        wanted = [n for n, item in enumerate(items) if item % group.per_depth == 0]
        if not wanted or group.width > MAP_TOKENS:
            return {}
        kept = [cache.kept_positions(layer) for layer in range(cache.num_layers)]
        found: dict[int, dict[str, Any]] = {
            items[row]: {"kept": [[h.tolist() for h in layer[row]] for layer in kept]}
            for row in wanted
        }
        if items[0] == 0:
            watched = (cache, prompt) if keep in self.watched else None
            found[0] |= dict(self._first(group, c, watched, answers, index))
        return found

    def _first(
        self,
        group: AbstractGroup,
        c: Compression,
        watched: tuple[KVCache, Prompt | CompressedPrompt] | None,
        answers: Answers,
        index: np.ndarray,
    ) -> Iterator[tuple[str, Any]]:
        """What is known of the very first item alone."""
        if answers.told is not None:
            tokens = behind(group, index)[1]
            assert tokens is not None
            values = {name: _short(row) for name, row in answers.told.items()}
            pieces = _behind_pieces(group, [*group.prompts[0], *tokens[0]])
            yield "following", {"tokens": pieces, **values}
        if evicts_later(c) and watched is not None:
            left = _departures(self.model, group, *watched, index)
            pieces = _behind_pieces(group, left.tokens)
            lists = [_whole(layer) for layer in left.left]
            yield "departures", {"tokens": pieces, "times": left.times, "left": lists}
        if any(isinstance(score, Oracle) for score in c.scores):
            if group is not self._worth[0]:  # the same at every budget
                self._worth = (group, _worth(self.model, group))
            if self._worth[1] is not None:
                yield "worth", self._worth[1]


def entry(cell: "Cell", item: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """The map of a cell, as it is written."""
    group = cell.group
    text, question = group.shown(item)
    return {
        "text": text,
        "question": question,
        "compression": cell.method.name,
        "keep": cell.keep,
        "task": group.title,
        "tokens": token_pieces(group.tokenizer.raw, group.prompts[item]),
        **found,
    }


def behind(group: AbstractGroup, index: np.ndarray) -> tuple[Any, Any]:
    """What is read behind the prompts of a batch: `(asked, told)`, either may be None.

    Questions are padded rows and their lengths; text that follows is `[B, N]`.
    """
    if isinstance(group, TextGroup):
        return None, group.follow[index]
    if isinstance(group, QuestionGroup):
        rows = [group.asked[i][0] for i in index]
        return pad_rows(rows, group.question_room) if any(rows) else None, None
    return None, None


def _departures(
    model: Decoder,
    group: AbstractGroup,
    cache: KVCache,
    prompt: Prompt | CompressedPrompt,
    index,
) -> Departures:
    """Of the first row, through its question and what the model replies to it."""
    watch = Watch(cache, 0, group.prompts[int(index[0])])
    asked, told = behind(group, index)
    room, width = group.room - (0 if asked is None else asked[0].shape[1]), 1
    if told is not None:
        width = max(1, -(-(told.shape[1] - 1) // MOST_STEPS))
        room = told.shape[1] // width
    read_on(
        model,
        cache,
        prompt.logits,
        watch,
        steps=min(MOST_STEPS, room - 1),
        asked=asked,
        told=told,
        width=width,
        stops=_stops(group),
    )
    return watch.seen()


def _stops(group: AbstractGroup) -> tuple[int, ...]:
    if isinstance(group, QuestionGroup):
        return tuple(group.framing.stops(group.task))
    return ()


def _worth(model: Decoder, group: AbstractGroup) -> list | None:
    """By layer and head, what each token of the first prompt is worth; None: too large.

    To the text that follows it, or to the expected answer.
    """
    prompt = [*group.prompts[0]]
    asked, told = behind(group, np.zeros(1, int))
    if asked is not None:
        prompt += asked[0][0][: asked[1][0]].tolist()
    if told is not None:
        later = told[0].tolist()
    else:
        assert isinstance(group, QuestionGroup)
        later = group.tokenizer.encode(group.episodes[0].turns[0].answer)
    tokens = [*prompt, *later]
    if not later or len(tokens) * model.config.vocab_size > MOST_LOGITS:
        return None
    rows = np.array([tokens], np.int32)
    slopes = jax.device_get(gate_slopes(model, rows, None, np.array([len(prompt)])))
    own = -slopes[:, 0, :, : len(group.prompts[0])]
    return [[_short(head) for head in layer] for layer in own]


def _behind_pieces(group: AbstractGroup, tokens: Any) -> list[str]:
    """Text of each token behind the first prompt, of all tokens."""
    return token_pieces(group.tokenizer.raw, tokens)[len(group.prompts[0]) :]


def _whole(layer: np.ndarray) -> list[list[int | None]]:
    """Steps at which tokens left; None: they did not."""
    return [[None if n < 0 else n for n in head] for head in layer.tolist()]


def _short(values: Any) -> list[float]:
    """Numbers of four digits: a map is text."""
    return [float(f"{value:.4g}") for value in np.asarray(values).tolist()]
