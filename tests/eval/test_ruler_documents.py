"""RULER's questions over documents of a user's file."""

import json
import pathlib
import re

import pytest

from kvjax.eval.tasks import make_task
from tests.eval.episodes import episode
from tests.eval.languages import hotpotqa, squad


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("asked")
    files = {"qa_1": ("squad.json", squad()), "qa_2": ("hotpot.json", hotpotqa())}
    for name, content in files.values():
        (folder / name).write_text(json.dumps(content))
    return {task: folder / name for task, (name, _) in files.items()}


@pytest.mark.parametrize(("name", "least"), [("qa_1", 1), ("qa_2", 10)])
@pytest.mark.parametrize("size", [1, 3, 30, 70, 100])
def test_documents_hold_the_answer(name, least, size, asked):
    _, made = episode(name, size, path=str(asked[name]))
    begin, text, end = re.split(r"\n\n(?=Document 1:)|\n\n$", made.context)
    assert begin == (
        "Answer the question based on the given documents. Only give me the answer and "
        "do not output any other words.\n\nThe following are given documents."
    )
    pages = re.split(r"(?:^|\n\n)Document (\d+):\n", text)
    numbers, pages = [int(one) for one in pages[1::2]], pages[2::2]
    assert not end and numbers == list(range(1, max(size, least) + 1))
    known = {"qa_1": 80, "qa_2": 80}[name]
    assert len(set(pages)) == min(known, len(pages))
    (turn,) = made.turns
    assert turn.answers[0] in text and turn.answer == f" {turn.answers[0]}"
    assert turn.question.startswith("Answer the question based on the given documents.")
    number = re.search(r"\d+(-\d)?(?=\?)", turn.question)
    assert number
    gold = [page for page in pages if re.search(rf"(Town|Number) {number[0]} ", page)]
    assert gold and turn.answers[0] in gold[0]
    if name == "qa_1" and size == 3:  # paragraphs of its article come first
        assert {page.split("-")[0] for page in pages} == {gold[0].split("-")[0]}


def test_questions_are_asked_once(asked):
    task = make_task("qa_2", path=str(asked["qa_2"]))
    made = task.episodes(0, 8, 3000)
    assert len({one.turns[0].question for one in made}) == 8
    with pytest.raises(ValueError, match="has 8 questions.*9 are asked for"):
        task.episodes(0, 9, 3000)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("qa_1", None, "needs `path`: a JSON file of SQuAD"),
        ("qa_2", None, "needs `path`: a JSON file of HotpotQA"),
        ("qa_1", {"date": []}, "`data` must be a list, as SQuAD"),
        ("qa_1", {"data": [{"paragraphs": [3]}]}, r"data\[0\].paragraphs\[0\]"),
        (
            "qa_1",
            {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b"}]}]}]},
            r"qas\[0\]: `answers` must be a list",
        ),
        (
            "qa_1",
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": "a",
                                "qas": [{"question": "b", "is_impossible": "false"}],
                            }
                        ]
                    }
                ]
            },
            r"qas\[0\]: `is_impossible` must be true or false",
        ),
        ("qa_1", {"data": []}, "no question that can be answered"),
        (
            "qa_2",
            [{"question": "a", "answer": "b"}],
            "record 1: there is no .*`context`",
        ),
        (
            "qa_2",
            [{"question": "a", "answer": "b", "context": [["t", "s"]]}],
            r"record 1: `context` must be a list of \[title",
        ),
        *(
            (
                "qa_2",
                [{"question": "a", "answer": "b", "context": context}],
                r"record 1: `context` must be a list of \[title",
            )
            for context in (0, [], {}, "", {"t": ["s"]})
        ),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path, name, content, match):
    (tmp_path / "f.json").write_text(json.dumps(content))
    fields = {"path": str(tmp_path / "f.json")} if content is not None else {}
    with pytest.raises(ValueError, match=match):
        make_task(name, **fields).episodes(0, 1, 3000)
