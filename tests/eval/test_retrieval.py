"""Retrieval from records, generated and read: counted here by other means."""

import gzip
import json
import re

import pytest

from kvjax.eval.tasks import make_task, stream
from kvjax.eval.tasks.babilong_words import EXAMPLES, FORMATS, INSTRUCTIONS
from tests.eval.episodes import episode
from tests.eval.languages import facts, write_lines


@pytest.mark.parametrize(
    ("name", "ask", "lines"),
    [
        ("kv_retrieval", r'Key: "(.+)"\nCorresponding value:', 40),
        (
            "scbench_kv",
            r'\nKey: "(.+)"\nThe value associated with the specified key is: ',
            1,
        ),
    ],
)
def test_objects_are_json_that_holds_what_is_asked(name, ask, lines):
    _, made = episode(name, 40, 5)
    begin, text = made.context.split("JSON data:\n")
    assert begin == (
        "Extract the value corresponding to the specified key in the JSON object "
        "below.\n\n"
    )
    records = json.loads(text)
    assert len(records) == 40 and len(text.strip().split("\n")) == lines
    assert text.endswith("}\n\n")
    for turn in made.turns:
        found = re.fullmatch(ask, turn.question)
        assert found and (records[found[1]],) == turn.answers


def test_row_objects_are_scored_letter_by_letter():
    task, made = episode("scbench_kv", 5)
    (turn,) = made.turns
    assert task.score(turn, f"It is {turn.answers[0]}.") == 1
    assert task.score(turn, turn.answers[0].upper()) == 0
    other = make_task("kv_retrieval")
    assert other.score(turn, turn.answers[0].upper()) == 1


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["kv_retrieval", "lines"])
def test_the_asked_record_stands_at_its_depth(name, depth):
    for seed in range(4):
        _, made = episode(name, 41, 2, seed, depth=depth)
        text = made.context
        places = [one.start() for one in re.finditer(r'": "|line \w+-\w+:', text)]
        at = text.index(made.turns[0].meta["key"])
        assert sum(place < at - 5 for place in places) == round(depth * 40)


def test_lines_hold_the_numbers_that_are_asked():
    task, made = episode("lines", 60, 3)
    found = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", made.context, re.M)
    known = dict(found)
    assert len(known) == len(found) == 60
    assert all(1 <= int(number) <= 50_000 for number in known.values())
    for turn in made.turns:
        key = re.fullmatch(
            r"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line "
            r"(\S+)\? I need the number\. ",
            turn.question,
        )
        assert key and turn.answers == (known[key[1]],)
        number = turn.answers[0]
        assert task.score(turn, f"In line 7 it is <{number}>.") == 1
        assert task.score(turn, f"{number}, or 3") == 0
        assert task.score(turn, f"{number}1") == 0


def key_values(count: int) -> list[dict]:
    pairs = [[f"key-{n}", f"value-{n}"] for n in range(count)]
    return [
        {"ordered_kv_records": pairs, "key": pairs[n][0], "value": pairs[n][1]}
        for n in range(count)
    ]


def test_objects_are_read_as_they_are(tmp_path):
    path = tmp_path / "kv.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(f"{json.dumps(one)}\n" for one in key_values(9))
    task = make_task("kv_retrieval", path=str(path))
    made = task.episodes(0, 9, 900, turns=3)
    assert len({one.turns[0].question for one in made}) == 9
    for one in made:
        records = json.loads(one.context.split("JSON data:\n")[1])
        assert list(records) == [f"key-{n}" for n in range(9)]
        assert len({turn.question for turn in one.turns}) == 3
        for turn in one.turns:
            key = json.loads(turn.question.split(": ")[1].split("\n")[0])
            assert turn.answers == (records[key],)
    assert task.episodes(0, 3, 900, turns=3) == made[:3]
    first = make_task("kv_retrieval", path=str(path), depth=0.0).episodes(0, 4, 900)
    for one in first:
        assert one.context.split('{"')[1].startswith(one.turns[0].meta["key"])
    with pytest.raises(ValueError, match="held out"):
        task.episode(stream("train", "kv_retrieval", 0, 0), 5)
    with pytest.raises(ValueError, match="9 items; 10 are asked for"):
        task.episodes(0, 10, 900)
    with pytest.raises(
        ValueError, match="2 of 2 items do not fit into a length of 200"
    ):
        task.episodes(0, 2, 200)
    cut = make_task("kv_retrieval", path=str(path), long="cut").episodes(0, 2, 200)
    assert all(one.context.startswith("Extract the value") for one in cut)
    assert all(len(one.context + one.turns[0].question) < 200 for one in cut)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ordered_kv_records": [["a"]]}, r"line 2: `ordered_kv_records` must be a li"),
        ({"ordered_kv_records": "a"}, "line 2: `ordered_kv_records` must be a list"),
        ({"key": "none"}, r"line 2: .* must be a list that has \['none', 'value-1'\]"),
        ({"value": 3}, "line 2: `value` must be a text"),
    ],
)
def test_objects_of_another_layout_are_refused(tmp_path, change, match):
    records = key_values(3)
    records[1] |= change
    path = write_lines(tmp_path / "kv.jsonl", records)
    with pytest.raises(ValueError, match=match):
        make_task("kv_retrieval", path=path).episodes(0, 1, 900)


def test_lines_are_read_as_they_are(tmp_path):
    _, made = episode("lines", 12)
    (turn,) = made.turns
    record = {
        "prompt": made.context + turn.question,
        "expected_number": turn.answers[0],
    }
    path = write_lines(
        tmp_path / "l.jsonl", [{**record, "expected_number": int(turn.answers[0])}]
    )
    (again,) = make_task("lines", path=path).episodes(0, 1, 2000)
    assert again.context == made.context and again.turns[0].question == turn.question
    assert again.turns[0].answers == turn.answers
    for change, match in (
        ({"prompt": "no record"}, "line 1: `prompt` must be a text with <"),
        ({"expected_number": 7}, "line 1: `prompt` must be a text with <7>"),
        ({"expected_number": -7}, "`expected_number` must be a whole number"),
    ):
        path = write_lines(tmp_path / "w.jsonl", [{**record, **change}])
        with pytest.raises(ValueError, match=match):
            make_task("lines", path=path).episodes(0, 1, 2000)


@pytest.mark.parametrize("haystack", ["noise", "essay"])
def test_the_passkey_stands_in_the_text(haystack, tmp_path):
    (tmp_path / "t.txt").write_text("One dog. Two cats. Three.")
    task, made = episode("passkey", 30, haystack=haystack, essays=str(tmp_path))
    (turn,) = made.turns
    line = r"^The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.$"
    found = re.findall(line, made.context, re.M)
    assert found == [(turn.answers[0],) * 2]
    assert turn.question == "What is the pass key?"
    assert task.score(turn, f"{turn.answers[0]}. 12345") == 1
    assert task.score(turn, f"12345 {turn.answers[0]}") == 0


def test_facts_are_asked_in_the_published_words(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", facts(4))
    task = make_task("babilong_qa1", path=path)
    for made in task.episodes(0, 4, 3000):
        (turn,) = made.turns
        text = made.context.split("<context>\n")[1].split("\n</context>")[0]
        assert text in {one["input"] for one in facts(4)}
        assert made.context + turn.question == (
            f"{INSTRUCTIONS['qa1']}\n\n{EXAMPLES['qa1']}\n\n{FORMATS['qa1']}\n\n"
            f"<context>\n{text}\n</context>\n\nQuestion: {turn.question[10:]}"
        )
        assert re.fullmatch(r"Question: Where is (John|Mary)\?", turn.question)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("The most recent location of John is kitchen.", 1),
        ("KITCHEN", 1),
        ("The kitchen. Then the garden.", 1),
        ("kitchen <context> garden", 1),
        ("kitchen<example>office", 1),
        ("the kitchen or the garden", 0),
        ("garden", 0),
        ("I was. In the kitchen", 0),
        ("", 0),
    ],
)
def test_facts_are_scored_as_published(tmp_path, reply, score):
    path = write_lines(tmp_path / "f.jsonl", facts(1))
    task = make_task("babilong_qa1", path=path)
    (made,) = task.episodes(0, 1, 3000)
    assert made.turns[0].answers == ("kitchen",)
    assert task.score(made.turns[0], reply) == score


def test_labels_of_the_question_do_not_count(tmp_path):
    item = {
        "input": "a",
        "question": "What is the garden north of?",
        "target": "office",
    }
    path = write_lines(tmp_path / "f.jsonl", [item])
    task = make_task("babilong_qa4", path=path)
    (made,) = task.episodes(0, 1, 3000)
    assert task.score(made.turns[0], "The garden is north of the office.") == 1
    wrong = write_lines(tmp_path / "g.jsonl", [{**item, "target": "moon"}])
    with pytest.raises(ValueError, match=r"line 1: `target` must be one of .*\(qa4\)"):
        make_task("babilong_qa4", path=wrong).episodes(0, 1, 3000)


def test_facts_without_a_file_are_looked_for(monkeypatch):
    monkeypatch.delenv("KVJAX_DATA", raising=False)
    with pytest.raises(ValueError, match="'babilong_qa2' needs `path`"):
        make_task("babilong_qa2").episodes(0, 1, 3000)


@pytest.mark.parametrize("name", ["kv_retrieval", "lines", "babilong_qa5"])
def test_published_files_are_read(name, shared_data):
    file = {
        "kv_retrieval": "kv_retrieval/kv-retrieval-75_keys.jsonl.gz",
        "lines": "longeval/200_lines.jsonl.gz",
        "babilong_qa5": "babilong/qa5_1k.jsonl.gz",
    }[name]
    path = shared_data / "eval" / file
    if not path.exists():
        pytest.skip(f"no {file} in the shared data")
    task = make_task(name, path=str(path))
    for made in task.episodes(0, 20, 30_000):
        assert task.score(made.turns[0], made.turns[0].answer) == 1
        assert made.turns[0].answers[0] in made.context
