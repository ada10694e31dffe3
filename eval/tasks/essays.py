"""Running text of the user's, as sentences that something can be hidden between."""

import functools
import logging
import os
import pathlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from kvjax.eval.tasks.stamps import stamp
from kvjax.eval.tasks.words import ADJECTIVES, NOUNS
from kvjax.files import read_text
from kvjax.messages import shown
from kvjax.places import expanded

LOG = logging.getLogger("kvjax.eval")

DATA = "KVJAX_DATA"
"""The environment variable that names a folder with `lm/gutenberg/*.txt`."""

MOST_WORDS, MOST_CHARACTERS = 60, 480
"""Of a sentence; what is longer, as tables are, is cut."""

_TITLES = "".join(rf"(?<!\b{one}\.)" for one in ("Mr", "Mrs", "Ms", "Dr", "St", "vs"))
_END = re.compile(
    rf"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]])){_TITLES}\s+(?=[\"'“‘(\[]*[A-Z0-9])"
    "|(?<=[。！？])"
)
_HEADER = re.compile(
    r"\A.*?\*\*\* ?START OF TH[^\n]*\*\*\*|\*\*\* ?END OF TH.*\Z", re.S
)


def sentences(path: str, field: str = "essays") -> tuple[str, ...]:
    """The sentences of a file, or of every `.txt` of a folder, spaces made one.

    Args:
        path: of the file or the folder; empty: `lm/gutenberg` in the folder that the
            environment variable KVJAX_DATA names, and without one sentences that are
            made up, which is said.
        field: that holds the path, for messages.

    Raises:
        ValueError: there is no such text, or it has no words.
    """
    if not path and not _default():
        return made_up()
    files = _files(path, field)
    found = _read(tuple((file, *stamp(file)) for file in files))
    if not found:
        raise ValueError(f"`{field}`: there is no word in {shown(files[0])}.")
    return found


def passage(rng: random.Random, text: Sequence[str], count: int) -> list[str]:
    """`count` sentences in a row from a random one on; the first follows the last."""
    start = rng.randrange(len(text))
    return [text[(start + at) % len(text)] for at in range(count)]


def essay_files(path: str, field: str = "essays") -> dict[str, pathlib.Path]:
    """The files that `sentences` reads, by their paths."""
    if not path and not _default():
        return {}
    return {file: pathlib.Path(file) for file in _files(path, field)}


def _files(path: str, field: str) -> list[str]:
    where = expanded(path or _default())
    if not os.path.isdir(where):  # `Path.is_dir` raises for names that are too long
        if not os.path.exists(where):
            raise ValueError(
                f"`{field}`: there is no file or folder at {shown(str(where))}."
            )
        return [str(where)]
    found = sorted(str(file) for file in where.glob("*.txt"))
    if not found:
        raise ValueError(f"`{field}`: no .txt file in the folder {shown(str(where))}.")
    return found


def _default() -> str:
    """The folder of the environment; empty: there is none."""
    data = os.environ.get(DATA, "")
    where = pathlib.Path(data, "lm", "gutenberg")
    return str(where) if data and os.path.isdir(where) else ""


@functools.cache  # is said once
def made_up() -> tuple[str, ...]:
    """Sentences of no meaning, all different: what essays are where none are given."""
    LOG.warning(
        "no essays are given: needles are hidden in sentences that are made up. Give "
        "the path of a text file or of a folder of them (`essays`), or set %s to a "
        "folder with lm/gutenberg/*.txt. RULER takes Paul Graham's essays.",
        DATA,
    )
    rng = random.Random("essays")
    return tuple(
        rng.choice(_PATTERNS).format(
            *(rng.choice(ADJECTIVES) for _ in range(2)),
            *(rng.choice(NOUNS) for _ in range(3)),
            rng.choice(_VERBS),
        )
        for _ in range(4096)
    )


_VERBS = (
    "found followed forgot painted carried borrowed remembered repaired watched left "
    "described counted hid met sold praised"
).split()
_PATTERNS = (
    "The {0} {2} {5} a {3} near the {1} {4}.",
    "Nobody knew why the {2} {5} the {0} {3} of the {4}.",
    "Once a {0} {2} {5} every {3} in the {1} {4}.",
    "In the {4}, a {2} {5} the {1} {3} before noon.",
    "When the {0} {3} was gone, the {2} {5} its {1} {4}.",
    "It is said that a {1} {2} {5} the {3}, and that the {4} was {0}.",
)


@functools.lru_cache(4)
def _read(stamps: tuple[tuple[Any, ...], ...]) -> tuple[str, ...]:
    return tuple(
        part
        for file, *_ in stamps
        for sentence in _END.split(_HEADER.sub("", read_text(file)))
        for part in _pieces(sentence)
    )


def _pieces(sentence: str) -> Iterator[str]:
    words = sentence.split()
    for at in range(0, len(words), MOST_WORDS):
        part = " ".join(words[at : at + MOST_WORDS])
        for begin in range(0, len(part), MOST_CHARACTERS):
            yield part[begin : begin + MOST_CHARACTERS].strip()
