"""Names for keys and values: words, numbers, identifiers, none of them twice."""

import functools
import os
import pathlib
import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated

from kvjax.eval.tasks.stamps import stamp
from kvjax.fields import OneOf
from kvjax.files import read_text, regular
from kvjax.messages import shown
from kvjax.places import expanded

ADJECTIVES = tuple(
    """
    amber ample ancient aqua arctic autumn basic bitter bold brave brief bright brisk
    broad broken busy calm careful cheap civil clean clear clever coastal cold common
    cosmic crisp curly daily damp dark deep dense distant dizzy double dry dusty eager
    early eastern easy elegant empty equal exact faint famous fancy fast fertile final
    firm flat fluffy formal fragile fresh frosty gentle giant glad golden grand grateful
    green heavy hidden hollow honest humble idle jolly keen kind large lazy light little
    lively local lonely loyal lucky magic major mellow merry mild misty modern modest
    muddy native neat noble noisy northern odd open orange outer pale patient plain
    polite proud purple quick quiet rapid rare ready royal rusty salty sandy scarlet
    secret serious shallow sharp shiny silent silver simple sleepy slow small smooth
    snowy soft solid southern spare square steady steep stormy strong sturdy sunny sweet
    swift tall tame tender thick tidy tiny tired upper useful vague vast velvet violet
    vivid warm western wide wild wise wooden yellow young
    """.split()
)
NOUNS = tuple(
    """
    acorn actor album anchor ankle apple apron arch arrow artist attic badge baker
    balloon banner barn basket beach beacon bell bench berry bicycle blanket blossom
    board bottle boulder branch bread brick bridge brook broom brush bucket builder
    butter button cabin cable camera canal candle canoe canyon captain carpet carrot
    castle cellar chair chapel cherry circle clay cliff clock cloud coach coffee comet
    compass copper coral corner cottage cotton creek cricket crown cup curtain dancer
    desert desk diary dinner doctor dragon drawer drum eagle engine falcon farmer
    feather fence ferry fiddle field flag flame flute forest fountain garden gate ginger
    glacier glass glove grape guitar hammer harbor harvest hedge helmet hill honey horse
    island ivory jacket jewel journal judge kettle kitchen kite ladder lake lamp lantern
    leaf lemon letter library lion lodge lunch magnet maple marble market meadow melon
    mirror monkey moon mountain museum needle nephew notebook ocean olive onion orchard
    otter oven oyster paddle painter palace panther paper parade parrot path peach
    pebble pencil pepper piano pilot pine planet plate pocket poem pony potato prairie
    puzzle rabbit radio railway rainbow ribbon river robin rocket roof rope sailor salad
    sandal saddle scarf school shadow shelf shell ship singer sister sketch spoon spring
    squirrel stairs statue stone stove stream street sugar summit swan table tailor
    teacher temple thunder ticket tiger timber toast tower train trumpet tulip tunnel
    turtle uncle valley violin voyage wagon waiter wallet walnut water wheel whistle
    willow window winter wizard wolf yard zebra
    """.split()
)

_KINDS = ("adjective", "noun", "verb")
Kind = Annotated[str, OneOf("numbers", "words", "uuids")]


def pairs(path: str = "") -> tuple[str, ...]:
    """Words that name something, each once; of our own lists, `amber-acorn` and so on.

    Args:
        path: a file with a word in each line, or a folder with `adjectivelist.txt` and
            `nounlist.txt`, which are paired.

    Raises:
        ValueError: there is no such file, or no word in it.
    """
    path = str(expanded(path)) if path else ""
    return _pairs(path, *stamp(path)) if path else _pairs(path)


@functools.lru_cache(8)
def _pairs(path: str, *stamps: int) -> tuple[str, ...]:
    del stamps
    if not path:
        return _paired(ADJECTIVES, NOUNS)
    if os.path.isdir(path):
        lists = [listed(f"{path}/{kind}list.txt") for kind in ("adjective", "noun")]
        return _paired(*lists)
    return listed(path)


def single(count: int, path: str = "") -> tuple[str, ...]:
    """Words to be counted, `count` or more where there are so many.

    Of our own lists the plain ones, and where these are too few, pairs.

    Args:
        count: how many are needed.
        path: see `pairs`; of a folder, `adjectivelist.txt`, `nounlist.txt` and
            `verblist.txt` are read, those that are there.

    Raises:
        ValueError: there is no such file, or no word in it.
    """
    if path:
        path = str(expanded(path))
        return _all(path, *stamp(path))
    plain = tuple(sorted({*ADJECTIVES, *NOUNS}))
    return plain if count <= len(plain) else pairs()


@functools.lru_cache(8)
def _all(path: str, *stamps: int) -> tuple[str, ...]:
    del stamps
    if not os.path.isdir(path):
        return listed(path)
    files = [pathlib.Path(path, f"{kind}list.txt") for kind in _KINDS]
    files = [file for file in files if file.exists()]
    if not files:
        raise ValueError(
            f"No lists of words in the folder {shown(path)}: expected nounlist.txt, "
            "adjectivelist.txt or verblist.txt, with a word in each line."
        )
    return tuple(sorted({word for file in files for word in listed(str(file))}))


def listed(path: str) -> tuple[str, ...]:
    """The words of a file with one in each line, sorted, each once.

    Raises:
        ValueError: there is no such file, or no word in it; names it.
    """
    file = regular(path)
    words = sorted({line.strip() for line in read_text(file).splitlines()} - {""})
    if not words:
        raise ValueError(f"{path} holds no word; expected one in each line.")
    return tuple(words)


def chosen(
    rng: random.Random, words: tuple[str, ...], count: int, taken: Iterable[str] = ()
) -> list[str]:
    """`count` of the words in random order, none twice and none that is taken.

    Where there are too few, they come again with a number behind them.
    """
    refused = set(taken)
    want = count + len(refused)
    rounds = -(-want // len(words))
    picked = (
        words[at % len(words)]
        + (f"-{at // len(words) + 1}" if at >= len(words) else "")
        for at in rng.sample(range(rounds * len(words)), want)
    )
    return [word for word in picked if word not in refused][:count]


def identifier(rng: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def number(rng: random.Random, digits: int = 7) -> str:
    """A number of so many digits, the first of which is no zero."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def distinct(
    draw: Callable[[], str], count: int, taken: Iterable[str] = ()
) -> list[str]:
    """`count` results of `draw`, none twice and none that is taken."""
    known = dict.fromkeys(taken)
    before = len(known)
    while len(known) < before + count:
        known[draw()] = None
    return list(known)[before:]


def named(
    rng: random.Random,
    kind: str,
    count: int,
    words: tuple[str, ...],
    taken: Iterable[str] = (),
) -> list[str]:
    """`count` names of a kind, none twice and none that is taken."""
    if kind == "words":
        return chosen(rng, words, count, taken)
    draw = {"numbers": number, "uuids": identifier}[kind]
    return distinct(lambda: draw(rng), count, taken)


def _paired(first: Iterable[str], second: Iterable[str]) -> tuple[str, ...]:
    def every() -> Iterator[str]:
        nouns = tuple(second)
        for adjective in first:
            yield from (f"{adjective}-{noun}" for noun in nouns)

    return tuple(sorted(set(every())))
