"""Rows of training data with seeded faults: a row comes of each, or words that say why.

A mutant is a file of good rows one of which was changed: values of other types, keys
that are gone or renamed, deep nesting, odd characters, bytes that are cut or replaced.
"""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvjax.train.data.words import Words
from kvjax.train.recipe import Source, Stage
from tests.train.datasets_samples import CHATML, chat_words, mixture, said

STAGES = (Stage(steps=9, lengths={96: 1.0}, tokens_per_step=288),)
GOOD = {
    "text": {"text": "a document of some words"},
    "messages": {"messages": said("a question", "an answer", "another", "more")},
    "prompt": {"prompt": "a question ", "answer": "an answer", "context": "so. "},
}
SOURCES: dict[str, dict[str, Any]] = {
    "text": {"text": "text"},
    "messages": {"messages": "messages"},
    "prompt": {"prompt": "prompt", "answer": "answer", "context": "context"},
}
VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: None,
    lambda rng: rng.choice([True, 0, -1, 3.5, 10**30, float("nan"), float("inf")]),
    lambda rng: rng.choice(["", " \n", "\0", "\ufeff", "\ud800", "é\U0001f600", "{}"]),
    lambda rng: "long " * rng.choice([9, 99, 9999]),
    lambda rng: rng.choice([[], {}, [None], ["a", "b"], [[]], {"a": {"b": 1}}]),
    lambda rng: [{"type": rng.choice(["text", "image_url", 3]), "text": "a part"}],
    lambda rng: json.loads("[" * 300 + "]" * 300),
    lambda rng: [{"role": "user", "content": "x"}] * rng.choice([1, 2, 50]),
)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch) -> None:
    """`datasets` keeps what it prepares in the test's own directory."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree with each of its keys."""
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in pairs:
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def changed(rng: random.Random, good: dict[str, Any]) -> str:
    """A line of JSON that differs from that of `good`."""
    row = copy.deepcopy(good)
    for _ in range(rng.choice([1, 1, 2])):
        where, key = rng.choice(list(places(row)) or [({}, 0)])
        kind = rng.randrange(4)
        if kind == 0 and len(where):
            del where[key]
        elif kind == 1 and isinstance(where, dict) and where:
            where[f"{key}s"] = where.pop(key)
        else:
            where[key] = rng.choice(VALUES)(rng)
    line = json.dumps(row)
    if rng.random() < 0.2:  # a fault of the bytes
        at = rng.randrange(len(line))
        line = rng.choice([line[:at], line[:at] + "\0" + line[at:], f"[{line}]", "3"])
    return line


def survives(path: Any, seed: int, words: Words) -> bool:
    """Whether a row comes of a file with one changed line; else words say why not."""
    rng = random.Random(seed)
    kind = rng.choice(list(GOOD))
    lines = [json.dumps(GOOD[kind])] * 2
    row = rng.randrange(3)
    lines.insert(row, changed(rng, GOOD[kind]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = Source(dataset=str(path), streaming=rng.random() < 0.6, **SOURCES[kind])
    try:
        one = mixture(source, words=words, stages=STAGES)
        batch = one.batch(0)
    except ValueError as wrong:
        told = str(wrong)
        assert repr(str(path)) in told and len(told) < 2000, (seed, told)
        rowed = re.search(rf"(line|record) {row + 1}\b", told)
        # Of a file as a whole: its only list, a column that the first rows lack.
        assert rowed or "no column" in told or "expected a list" in told, (seed, told)
        return False
    assert np.asarray(batch.weights).sum() > 0, seed
    assert np.asarray(batch.tokens).max() < words.vocab_size, seed
    for reason, first in one.readers[0][1].left_out.first.items():
        assert f"line {row + 1}" in first, (seed, reason, first)
    return True


def sweep(path: Any, seeds: range) -> None:
    words = chat_words(CHATML)
    outcomes = [survives(path, seed, words) for seed in seeds]
    assert 0.2 < np.mean(outcomes) < 0.9  # faults of both kinds


def test_changed_rows_give_a_row_or_words(tmp_path):
    sweep(tmp_path / "rows.jsonl", range(150))


@pytest.mark.slow
@pytest.mark.sweep(0, 0)
def test_many_changed_rows_give_a_row_or_words(tmp_path):
    sweep(tmp_path / "rows.jsonl", range(150, 2500))
