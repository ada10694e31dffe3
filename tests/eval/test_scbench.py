"""SCBench's generated tasks: counted here by other means."""

import json
import re
import statistics

import pytest

from kvjax.eval.tasks import make_task
from tests.eval.episodes import episode
from tests.eval.languages import shared, shots, write_lines


@pytest.mark.parametrize("size", [1, 6, 200])
def test_one_string_begins_and_ends_as_asked(size):
    _, made = episode("scbench_prefix_suffix", size, 5)
    strings = json.loads(made.context[made.context.index("[") :])
    assert len(strings) == max(size, 5)
    assert all(65 <= len(one) <= 122 for one in strings)
    for turn in made.turns:
        asked = re.fullmatch(
            r'\nPrefix: "(\w+)"\nSuffix: "(\w+)"\nThe string is: ', turn.question
        )
        assert asked
        found = [s for s in strings if s.startswith(asked[1]) and s.endswith(asked[2])]
        assert tuple(found) == turn.answers
    if size == 200:  # neither end alone tells it
        first = made.turns[0].meta
        assert sum(one.startswith(first["prefix"]) for one in strings) > 1
        assert sum(one.endswith(first["suffix"]) for one in strings) > 1


@pytest.mark.parametrize("size", [1, 5, 100, 1001])
@pytest.mark.parametrize("largest", [20, 999])
def test_statistics_are_of_the_list(size, largest):
    for seed in range(5):
        task, made = episode("scbench_mf", size, 7, seed, largest=largest)
        numbers = json.loads(made.context)
        ranked = sorted(set(numbers))
        assert len(numbers) % 2 and abs(len(numbers) - max(size, 5)) <= 1
        assert 0 <= min(numbers) and max(numbers) <= largest
        want = {
            "largest": ranked[-1],
            "second largest": ranked[-2],
            "third largest": ranked[-3],
            "smallest": ranked[0],
            "second smallest": ranked[1],
            "third smallest": ranked[2],
            "median": statistics.median(numbers),
        }
        assert len(made.turns) == 7
        for turn in made.turns:
            which = turn.meta["which"]
            assert turn.answers == (str(want.pop(which)),)
            assert turn.question == (
                f"What is the {which} number of the list?\n\nYou should answer with "
                f"only one number, no other words. The {which} number of the list is: "
            )


@pytest.mark.parametrize(
    ("reply", "score"),
    [("{0}", 1), ("It is {0}, not 5.", 1), ("{0}.0", 1), ("5 or {0}", 0), ("{0}7", 0)]
    + [("9" * 5000, 0), ("٣", 0), ("00{0}", 1)],
)
def test_the_first_number_counts(reply, score):
    task, made = episode("scbench_mf", 50)
    (turn,) = made.turns
    assert turn.answer != "5"
    assert task.score(turn, reply.format(turn.answer)) == score


def test_chains_are_asked_in_turn():
    task, made = episode("scbench_vt", 30, 5)
    assert len(made.turns) == 5 and all(len(one.answers) == 3 for one in made.turns)
    assert "3 variables are assigned" in made.turns[0].prefix
    one = made.turns[0]
    assert task.score(one, one.answers[1]) == pytest.approx(1 / 3)
    _, two = episode("scbench_vt", 30, 1)
    text = two.context.split("Memorize and track")[2]
    assert len(re.findall(r"= \d{5}", text)) == 2


def test_examples_are_shown_and_others_asked(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", shots(40))
    task, made = episode("scbench_many_shot", 25, 4, path=path)
    known = {f"Q: {one['text']}\nA:": one["label"] for one in shots(40)}
    seen = [f"{one}\nA:" for one in re.findall(r"^Q: .*$", made.context, re.M)]
    assert len(set(seen)) == 25 and {*seen} <= {*known}
    for one in seen:
        assert f"{one} {known[one]}\n\n" in made.context
    for turn in made.turns:
        assert turn.question in known and turn.question not in seen
        assert turn.answers == (known[turn.question],)
        assert task.score(turn, f"{turn.answers[0].lower()} of course") == 1
        assert task.score(turn, "(C)") == 0
    _, whole = episode("scbench_many_shot", 99, 1, path=path)
    assert whole.context.count("Q: ") == 39


def test_examples_come_from_a_file(tmp_path):
    with pytest.raises(ValueError, match="needs `path`: a file of examples"):
        episode("scbench_many_shot", 3)
    path = write_lines(tmp_path / "s.jsonl", shots(2))
    with pytest.raises(ValueError, match="has 2 examples, which is no more than 2"):
        episode("scbench_many_shot", 3, 2, path=path)
    path = write_lines(tmp_path / "t.jsonl", [{"question": "a?", "answer": "b"}] * 3)
    _, made = episode("scbench_many_shot", 1, path=path)
    assert made.context == "Q: a?\nA: b\n\n"
    path = write_lines(tmp_path / "u.jsonl", [{"text": "a?"}] * 3)
    with pytest.raises(ValueError, match=r"line 1: there is no column `label`"):
        episode("scbench_many_shot", 1, path=path)


def published(tmp_path, kind: str, context: object, *turns: dict):
    record = {"context": context, "multi_turns": turns}
    path = write_lines(tmp_path / "p.jsonl", [record])
    task = make_task("scbench", path=path, kind=kind)
    return task, task.episodes(0, 1, 3000, turns=5)[0]


def test_records_are_asked_in_their_order(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", shared(3))
    task = make_task("scbench", path=path)
    for made in task.episodes(0, 3, 3000, turns=4):
        assert made.context.startswith(
            "Extract the value corresponding to the specified"
        )
        pairs = json.loads(made.context.split("JSON data:\n")[1])
        for at, turn in enumerate(made.turns):
            key = list(pairs)[3 + at]
            assert turn.question == f'Key: "{key}"\nThe value is: '
            assert turn.answer == pairs[key] and task.score(turn, turn.answer) == 1
        assert len(made.turns) == 4
    (cut,) = make_task("scbench", path=path, long="cut").episodes(0, 1, 300)
    assert cut.context.startswith("Extract the value") and "cut" in cut.turns[0].meta


def test_each_kind_is_scored_as_coded(tmp_path):
    vt, made = published(
        tmp_path, "vt", "VAR A = 1", {"input": "Which?", "answer": ["AB", "CD"]}
    )
    assert made.context == "VAR A = 1\n\n" and made.turns[0].answer == " AB CD"
    assert vt.score(made.turns[0], "it is cd") == 0.5 and vt.max_new_tokens == 30
    ask = "You should answer with one number. The largest number of the list is: "
    mf, made = published(tmp_path, "mf", [3, 9, 4], {"input": ask, "answer": 9})
    assert made.context == "[3, 9, 4]\n\n"
    assert made.turns[0].question == f"What is the largest number of the list?\n\n{ask}"
    assert mf.score(made.turns[0], "9.0 or 4") == 1
    assert mf.score(made.turns[0], "4 or 9") == 0
    qa, made = published(
        tmp_path, "qa_eng", "A book.", {"input": "Who?", "answer": "Ann"}
    )
    assert made.turns[0].question == "Question: Who?\nAnswer:"
    assert qa.score(made.turns[0], "ANN, I think") == 1
    assert qa.score(made.turns[0], "Ben") == 0


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("kv", {"context": 3}, "line 1: `context` must be a text"),
        ("kv", {"multi_turns": []}, "line 1: `multi_turns` must be a list"),
        ("kv", {"multi_turns": ["a"]}, "line 1: `multi_turns` must be a list of obj"),
        ("kv", {"multi_turns": [{"input": "a"}]}, r"turns\[0\]: `answer` must be"),
        (
            "mf",
            {"multi_turns": [{"input": "a", "answer": 3}]},
            r"line 1, multi_turns\[0\]: `input` must be `The ... is`",
        ),
        (
            "mf",
            {"multi_turns": [{"input": "The largest is", "answer": "٣"}]},
            r"line 1, multi_turns\[0\]: `input` must be `The ... is`",
        ),
        ("mf", {"context": [1, "2"]}, "line 1: `context` must be a list of numbers"),
    ],
)
def test_records_of_another_layout_are_refused(tmp_path, kind, change, match):
    path = write_lines(tmp_path / "p.jsonl", [{**shared(1)[0], **change}])
    with pytest.raises(ValueError, match=match):
        make_task("scbench", path=path, kind=kind).episodes(0, 1, 3000)
    with pytest.raises(ValueError, match="'scbench' needs `path`"):
        make_task("scbench").episodes(0, 1, 3000)
