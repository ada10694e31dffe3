"""Filler: plain sentences between the records of a task."""

import random
from collections.abc import Sequence

STOCK = (
    "the rain is warm. ",
    "we walk and talk. ",
    "the road is long. ",
    "so it goes. ",
)
"""The redundant share of the filler."""

_ADJECTIVES = ("old", "red", "shy", "tall", "calm", "wet", "odd", "kind", "slow", "new")
_NOUNS = ("fox", "boat", "king", "tree", "girl", "lamp", "bird", "cook", "hill", "dog")
_VERBS = ("saw", "met", "left", "held", "drew", "kept", "lost", "made", "took", "hid")
_OBJECTS = ("a map", "the sea", "a coin", "my hat", "the sun", "a key", "jam", "ice")


def sentence(rng: random.Random, redundancy: float) -> str:
    """One sentence with a trailing space."""
    if rng.random() < redundancy:
        return rng.choice(STOCK)
    return (
        f"the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} "
        f"{rng.choice(_VERBS)} {rng.choice(_OBJECTS)}. "
    )


def sentences(rng: random.Random, chars: int, redundancy: float) -> list[str]:
    """Sentences of at most `chars` characters together."""
    out = []
    while True:
        line = sentence(rng, redundancy)
        if len(line) > chars:
            break
        out.append(line)
        chars -= len(line)
    return out


def scatter(
    rng: random.Random,
    records: Sequence[str],
    filler: Sequence[str],
    depths: Sequence[float | None] | None = None,
) -> str:
    """Records in their order between sentences, at random or at given depths.

    Args:
        rng: where the places come from.
        records: the texts to place.
        filler: the sentences between them.
        depths: per record, its place as a fraction of the filler in [0, 1], or None
            for a random one; None for all random.
    """
    depths = depths or [None] * len(records)
    at: list[list[str]] = [[] for _ in range(len(filler) + 1)]
    free = sorted(rng.randint(0, len(filler)) for depth in depths if depth is None)
    for record, depth in zip(records, depths, strict=True):
        place = free.pop(0) if depth is None else round(depth * len(filler))
        at[place].append(record)
    parts = []
    for index, here in enumerate(at):
        parts += here
        if index < len(filler):
            parts.append(filler[index])
    return "".join(parts)
