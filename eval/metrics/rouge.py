"""ROUGE as the package `rouge` computes it, which LongBench and LooGLE are scored with.

It differs from other ROUGE scores: words are split at spaces alone, in their case and
with their punctuation; sentences end at every full stop; words and n-grams are counted
once; ROUGE-L takes the union of the longest common subsequences of all pairs of
sentences.

Source: `rouge` 1.0.1 (Apache-2.0), by its definition. Deviations: it raises for texts
without a sentence and at sentences of some thousand words; here those score 0 and are
scored.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """What a text shares with a reference.

    Attributes:
        precision: share of the text.
        recall: share of the reference.
    """

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean; just below 1 for equal texts, as published."""
        both = self.precision + self.recall + 1e-8
        return 2 * self.precision * self.recall / both


NOTHING = Overlap(precision=0.0, recall=0.0)


def rouge_n(text: str, reference: str, n: int) -> Overlap:
    """N-grams in common."""
    found, wanted = _grams(text, n), _grams(reference, n)
    return _overlap(len(found & wanted), len(found), len(wanted))


def rouge_l(text: str, reference: str) -> Overlap:
    """Words of longest common subsequences, sentence by sentence."""
    found, wanted = _sentences(text), _sentences(reference)
    common: set[str] = set()
    for one in wanted:
        for other in found:
            common.update(_common(one, other))
    flat = [
        {word for sentence in side for word in sentence} for side in (found, wanted)
    ]
    return _overlap(len(common), *map(len, flat))


def _overlap(common: int, found: int, wanted: int) -> Overlap:
    if not found or not wanted:
        return NOTHING
    return Overlap(precision=common / found, recall=common / wanted)


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; what is between two stops counts as an empty word."""
    parts = (part for part in text.split(".") if part)
    return [" ".join(part.split()).split(" ") for part in parts]


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = [word for sentence in _sentences(text) for word in sentence]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _common(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several the one that `rouge` takes."""
    rows = [[0] * (len(second) + 1)]
    for word in first:
        above, row = rows[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
