"""What a reply that thinks aloud says in the end: a number, or a letter."""

import itertools
import re
from fractions import Fraction

from kvjax.eval.metrics.boxed import last_box
from kvjax.eval.metrics.numbers import number, numbers

_IS = re.compile(r"\banswer\s+is\b\s*:?", re.IGNORECASE)
_COLON = re.compile(r"\banswer\s*:", re.IGNORECASE)
_AT_ONCE = re.compile(r"(?:\\boxed|[^\w\n])*\d")
_HASHES = re.compile(r"####\s*([^\n]*)")
SENTENCE, MOST = 400, 100
"""Characters behind `answer is` that are looked at, and how many times."""


def said_number(reply: str) -> Fraction | None:
    """The number that a reply ends in; None without one.

    It is the first one that follows `answer is` at once (behind the last `=` of its
    sentence, if that has one), else that behind `####`, else that of the last box, else
    the last one that follows `answer:` at once, else the first of the last sentence
    with `answer is` that has any, else the last number.
    """
    said = [one for one in _behind(_IS, reply) if numbers(one)]
    for one in said:
        if _AT_ONCE.match(one):
            return _result(one)
    if (found := _HASHES.search(reply)) and (marked := numbers(found[1])):
        return marked[0]
    if (box := last_box(reply)) and (value := number(box)) is not None:
        return value
    for one in reversed(_behind(_COLON, reply)):
        if _AT_ONCE.match(one):
            return _result(one)
    if said:
        return _result(said[-1])
    every = numbers(reply)
    return every[-1] if every else None


def _behind(pattern: re.Pattern[str], reply: str) -> list[str]:
    """What follows a phrase in its sentence, each time."""
    places = itertools.islice(pattern.finditer(reply), MOST)
    texts = (reply[one.end() : one.end() + SENTENCE] for one in places)
    return [re.split(r"\n|[.!?](?:\s|$)", text, maxsplit=1)[0] for text in texts]


def _result(sentence: str) -> Fraction:
    return (numbers(sentence.rpartition("=")[2]) or numbers(sentence))[0]


def said_letter(reply: str, letters: str) -> str | None:
    """The letter that a reply chooses; None without one.

    It is the first behind `answer is` in its sentence, else one that begins the reply,
    else the first behind `answer:`, else the last one in brackets, else the last that
    stands alone. `A dog` begins with no letter.

    Args:
        reply: what was written.
        letters: those that there are, `ABCD`.
    """
    alone = rf"(?<![A-Za-z'])[{letters}](?![A-Za-z'])"
    for sentence in _behind(_IS, reply):
        if said := re.search(alone, sentence):
            return said[0]
    no_article = rf"{alone}(?!(?<=A) [a-z])"
    if said := re.match(rf"[\s(*]*({no_article})", reply):
        return said[1]
    for sentence in _behind(_COLON, reply):
        if said := re.search(no_article, sentence):
            return said[0]
    for pattern in (rf"\(([{letters}])\)", rf"({alone})"):
        if every := re.findall(pattern, reply):
            return every[-1]
    return None
