"""What metrics share: texts without punctuation, F1 of what two of them hold."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Asked(Protocol):
    """What metrics see of a turn (`kvjax.eval.tasks.Turn`)."""

    @property
    def answer(self) -> str:
        """A perfect reply."""
        ...

    @property
    def answers(self) -> tuple[str, ...]:
        """What replies are compared with, where that is not `answer`."""
        ...

    @property
    def meta(self) -> Mapping[str, Any]:
        """What else is known."""
        ...


Metric = Callable[[Asked, str], float]
"""How right a reply is, in [0, 1]; raises ValueError where the turn lacks what it
needs, whatever the reply is."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def references(turn: Asked) -> tuple[str, ...]:
    """What replies are compared with: one text or more."""
    return turn.answers or (turn.answer,)


def plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def plain_characters(text: str) -> list[str]:
    """Characters in lower case, without spaces and punctuation, the Chinese too."""
    return [one for one in text.lower() if not (one.isspace() or _is_mark(one))]


def _is_mark(one: str) -> bool:
    if one in string.punctuation or unicodedata.category(one).startswith("P"):
        return True
    return unicodedata.normalize("NFKC", one) in string.punctuation  # of full width


def f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags of words: twice those in common over those of both."""
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def best(turn: Asked, score: Callable[[str], float]) -> float:
    """The best score that any reference gives."""
    return max(score(one) for one in references(turn))


def qa_f1(turn: Asked, reply: str) -> float:
    """F1 of words with the reference that fits best."""
    words = plain_words(reply)
    return best(turn, lambda one: f1(words, plain_words(one)))


def qa_f1_zh(turn: Asked, reply: str) -> float:
    """F1 of characters with the reference that fits best, for Chinese."""
    found = plain_characters(reply)
    return best(turn, lambda one: f1(found, plain_characters(one)))
