"""RULER's lists of words: how often each stands there, counted by other means."""

import collections
import re

import pytest

from kvjax.eval.tasks import make_task, stream
from tests.eval.episodes import episode


@pytest.mark.parametrize(
    ("length", "often", "seldom", "shot"),
    [(1000, 6, 1, (3, 1)), (4500, 30, 3, (10, 3))],
)
def test_common_words_are_the_most_frequent(length, often, seldom, shot):
    task = make_task("cwe")
    (made,) = task.episodes(0, 1, length, lambda one: len(one.context.split()))
    parts = made.context.split("Below is a numbered list of words.")[1:]
    for text, counts in zip(parts, (shot, (often, seldom)), strict=True):
        entries = re.findall(r"(\d+)\. (\S+)", text.split("Question:")[0])
        assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1))
        ranked = collections.Counter(word for _, word in entries).most_common()
        assert {count for _, count in ranked[:10]} == {counts[0]}
        assert {count for _, count in ranked[10:]} == {counts[1]}
    (turn,) = made.turns
    assert {word for word, _ in ranked[:10]} == set(turn.answers)
    assert turn.question == (
        "Question: What are the 10 most common words in the above list? "
    )
    assert re.findall(r"\d+\. (\S+)", turn.answer) == list(turn.answers)
    answer = parts[0].split("in the list are:")[1]
    assert len(re.findall(r"\d+\. \S+", answer)) == 10


def test_frequent_words_are_no_more_frequent_than_others():
    with pytest.raises(ValueError, match="`repeats` must be more than `others`"):
        make_task("cwe", repeats=2)
    _, made = episode("cwe", 400, repeats=2, others=1, example=False, common=3)
    assert len(set(re.findall(r"\d\. (\S+)", made.context))) == 403


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.5])
@pytest.mark.parametrize("size", [1000, 1017, 20_000])
def test_coded_words_follow_the_law(alpha, size):
    _, made = episode("fwe", size, alpha=alpha)
    text = made.context.removesuffix("\n").split("coded words. ")[1]
    (noise, most), *ranked = collections.Counter(text.split(" ")).most_common()
    total = sum(rank**-alpha for rank in range(1, 10_000))
    total += 10_000 ** (1 - alpha) / (alpha - 1)  # of all the ranks behind
    assert noise == "..." and abs(most - size / total) < 2 + size / 300
    assert [word for word, _ in ranked[:3]] == list(made.turns[0].answers)
    assert ranked[2][1] > ranked[3][1] if len(ranked) > 3 else True
    want = [int(size / total * rank**-alpha) for rank in range(2, 5)]
    assert all(
        abs(a - b) <= 1 + b / 50 for (_, a), b in zip(ranked, want, strict=False)
    )
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)


def test_every_size_of_coded_words_has_three():
    task = make_task("fwe")
    least = task.smallest(0)
    for size in range(least, least + 200):
        made = task.episode(stream("test", "fwe", 0, size), size)
        ranked = collections.Counter(made.context.split()[21:]).most_common()
        counts = dict(ranked)
        third = min(counts[word] for word in made.turns[0].answers)
        asked = {"...", *made.turns[0].answers}
        assert all(n < third for word, n in ranked if word not in asked)
    with pytest.raises(ValueError, match=f"needs {least} words"):
        task.episode(stream("test", "fwe", 0, 0), least - 1)
