"""Seeded changes to trees and to bytes, as people and programs make them."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

NUMBERS = (0, -1, 1, 2, 0.5, -0.5, 1e-300, 1e300, 10**30, -(10**30), 2**31, 2**63)
ODD = (float("nan"), float("inf"), -float("inf"), True, False, None)
TEXTS = ("", "0", "1.0", "null", "nan", "[]", "a" * 5000, "é\U0001f600", "\0", "../x")
TREES = ([], {}, [[]], [None], {"a": 1}, [1, 2, 3], {"type": "x"}, [[[[[[]]]]]])


def values(rng: random.Random, old: Any) -> Any:
    """Another value for `old`."""
    pick = rng.random()
    if pick < 0.3:
        return rng.choice(NUMBERS)
    if pick < 0.5:
        return rng.choice(ODD)
    if pick < 0.65:
        return rng.choice(TEXTS)
    if pick < 0.8:
        return copy.deepcopy(rng.choice(TREES))
    if isinstance(old, bool):
        return int(old)
    if isinstance(old, int | float):
        return rng.choice([-old, old + 0.5, str(old), [old], old * 10**9, old + 1])
    if isinstance(old, str):
        return rng.choice([old.upper(), old[:-1], old + "x", [old], {old: old}])
    return [old, old]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in pairs:
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def changed(rng: random.Random, tree: Any) -> Any:
    """A tree that differs from `tree` in one place or in two."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2])):
        spots = list(places(tree))
        if not spots:
            break
        owner, key = rng.choice(spots)
        what = rng.random()
        if what < 0.75:
            owner[key] = values(rng, owner[key])
        elif what < 0.87:
            del owner[key]
        elif isinstance(owner, dict):
            owner[f"{key}x" if rng.random() < 0.5 else str(key)[:-1]] = owner.pop(key)
        else:
            owner.append(copy.deepcopy(owner[key]))
    return tree


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes of a file that was cut off, overwritten, encoded anew or doubled."""
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(rng.randrange(256) for _ in range(3)) + data[at + 3 :]
    if kind == 2:
        return data + data
    if kind == 3:
        return data.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
    if kind == 4:
        return b"[" * 100_000 + data
    if kind == 5:
        return data.replace(b":", b": {", 1)
    if kind == 6:
        return b"\0" * len(data)
    lines = data.splitlines(keepends=True)
    again = rng.choice(lines)
    return data.replace(again, again + again, 1)


def as_json(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode()
