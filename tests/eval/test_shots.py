"""Worked examples, choices, functions and long replies: the tasks of KVFundaBench."""

import gzip
import json
from typing import Any

import pytest

from kvjax.eval.tasks import make_task
from kvjax.eval.tasks.base import characters
from kvjax.eval.tasks.humaneval import program
from tests.eval import published
from tests.eval.published import write

EVERY = 10**6


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return published.files(tmp_path_factory.mktemp("published"))


def make(name: str, **fields: Any) -> Any:
    """A task of files, whatever it has beside what all tasks have."""
    return make_task(name, **fields)


def every(task, turns=1):
    return task.episodes(1, len(task.drafts(turns)), EVERY, turns=turns)


def test_examples_are_worked_and_never_the_problem_itself(fields):
    for name in ("gsm8k", "mmlu", "csqa", "humaneval"):
        task = make(name, **fields[name])
        shots = fields[name]["shots"]
        for episode in every(task):
            (turn,) = episode.turns
            assert turn.question not in episode.context
            assert turn.meta["shots"] == shots
            assert episode.context.count("\n\n") >= shots
        assert make(name, **{**fields[name], "shots": 0}).drafts(1)[0].size == 0
        with pytest.raises(ValueError, match="`shots` asks for 50"):
            make(name, **{**fields[name], "shots": 50}).drafts(1)


def test_problems_of_the_same_examples_are_turns(fields):
    found = every(make("mmlu", **fields["mmlu"]), turns=4)
    assert sorted(len(one.turns) for one in found) == [2, 2, 4, 4]
    for one in found:
        assert len({turn.meta["group"] for turn in one.turns}) == 1
        assert one.turns[0].meta["group"].replace("_", " ") in one.context


def test_a_cut_leaves_out_whole_examples(fields):
    task = make("gsm8k", **fields["gsm8k"], long="cut")
    (whole,) = task.episodes(0, 1, EVERY)
    (cut,) = task.episodes(0, 1, characters(whole) - 1)
    assert cut.turns[0].meta["shots"] == 2
    assert whole.context.startswith(cut.context) and cut.context.endswith("\n\n")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (" It is 1004.", 1),
        (" The answer is $1,004.00.", 1),
        (" The answer is -1004.", 0),
        (" The answer is 1004.\nQuestion: And 5?\nAnswer: 7", 1),
        (" 1004, no, 1005", 0),
    ],
)
def test_gsm8k_compares_numbers(fields, reply, score):
    task = make("gsm8k", **fields["gsm8k"])
    item = next(one for one in every(task) if one.turns[0].meta["value"] == "1,004")
    assert task.score(item.turns[0], reply) == score


@pytest.mark.parametrize("answer", ["18", "#### ", "#### many"])
def test_a_row_of_gsm8k_without_a_result_is_named(tmp_path, answer):
    path = write(tmp_path / "t.jsonl", [{"question": "Q", "answer": answer}])
    with pytest.raises(ValueError, match="line 1: `answer` must be steps"):
        make("gsm8k", path=path, shots=0).drafts(1)


def test_examples_are_looked_for_beside_the_problems(tmp_path):
    path = write(tmp_path / "test.jsonl", published.gsm8k())
    with pytest.raises(ValueError, match="needs `shots_path`.*'train'.*beside.*: 0"):
        make("gsm8k", path=path, shots=2).drafts(1)
    write(tmp_path / "train.jsonl", published.gsm8k(4, 100))
    latest = write(tmp_path / "latest_test.jsonl", published.gsm8k())
    write(tmp_path / "latest_train.jsonl", published.gsm8k(4, 100))
    for place in (path, latest, str(tmp_path)):
        draft = make("gsm8k", path=place, shots=2).drafts(1)[0]
        assert "Ann has 100 nuts" in draft.make(2).context
    hub = [{"question": "Q?", "choices": ["x", "y"], "answer": 1, "subject": "s"}]
    path = write(tmp_path / "hub.jsonl", hub)
    (draft,) = make("mmlu", path=path, shots=0).drafts(1)
    assert draft.make(0).turns[0].answer == " B"


def test_defaults_are_in_the_folder_of_data(tmp_path, monkeypatch):
    folder = tmp_path / "eval" / "gsm8k"
    folder.mkdir(parents=True)
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path))
    for name, begin in (("test", 0), ("train", 100)):
        text = "\n".join(map(json.dumps, published.gsm8k(9, begin)))
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(make("gsm8k").drafts(1)) == 9
    assert len(make("longgenbench", problems=4).drafts(1)) == 2


@pytest.mark.parametrize("name", ["mmlu", "csqa"])
def test_choices_by_likelihood(fields, name):
    task = make(name, **fields[name], by="likelihood")
    for episode in every(task):
        (turn,) = episode.turns
        assert turn.answer in turn.choices
        assert [task.score(turn, one) for one in turn.choices].count(1) == 1


def test_layouts_of_choices(tmp_path):
    row = {
        "question": "Where?",
        "choices": {"label": ["A", "B"], "text": ["here", "there"]},
        "answerKey": "B",
    }
    path = write(tmp_path / "dev.jsonl", [row])
    turn = make("csqa", path=path, shots=0).drafts(1)[0].make(0).turns[0]
    assert turn.question == "Where?\nA. here\nB. there\n" and turn.answer == " B"
    for change, said in (
        ({"answerKey": "C"}, "`answerKey` must be one of"),
        ({"choices": {"label": ["B", "A"], "text": ["x", "y"]}}, "labels are A, B"),
        ({"choices": None}, "labels are A, B"),
        ({"question": ""}, "`question` must be a text"),
    ):
        write(tmp_path / "dev.jsonl", [{**row, **change}])
        with pytest.raises(ValueError, match=f"line 1: {said}|line 1: .*{said}"):
            make("csqa", path=path, shots=0).drafts(1)
    for choices in (["a"], "a", list("abcdefghijk")):
        rows = [{**published.mmlu(1)[0], "choices": choices}]
        with pytest.raises(ValueError, match="line 1: `choices` must be a list of 2"):
            make("mmlu", path=write(tmp_path / "m.jsonl", rows), shots=0).drafts(1)
    rows = [{**published.humaneval(1)[0], "entry_point": "class"}]
    with pytest.raises(ValueError, match="line 1: `entry_point` must be the name"):
        path = write(tmp_path / "h.jsonl", rows)
        make("humaneval", path=path, shots=0, allow_code=True).drafts(1)
    rows = [{**published.mmlu(1)[0], "answer": "E"}]
    with pytest.raises(ValueError, match="line 1: `answer` must be a letter of ABCD"):
        make("mmlu", path=write(tmp_path / "m.jsonl", rows), shots=0).drafts(1)


def test_code_runs_only_where_that_is_allowed(fields):
    given = {**fields["humaneval"], "allow_code": False}
    task = make("humaneval", **given)
    with pytest.raises(ValueError, match="runs code that the model writes.*--allow"):
        task.episodes(0, 1, EVERY)
    (episode,) = make("humaneval", **fields["humaneval"]).episodes(0, 1, EVERY)
    with pytest.raises(ValueError, match="runs code that the model writes"):
        task.score(episode.turns[0], episode.turns[0].answer)


@pytest.mark.parametrize(
    ("reply", "passed"),
    [
        ("    return x + 1\n\nprint(add1(2))\n", True),
        ("    return x + 1\n# Test\nassert False", True),
        ("Sure:\n```python\ndef add1(x: List):\n    return x + 1\n```\nDone.", True),
        ("```\n    return x + 1\n```", True),
        ("def add1(x):\n    return x + 1\n\ndef add2(x): 1/0\nadd2(1)", True),
        ("def help1(x):\n    return x\n\ndef add1(x):\n    return help1(x) + 1", True),
        ("    return x - 1", False),
        ("    import sys\n    sys.exit(0)", False),
        ("```python\nimport os\nos._exit(0)\n```", False),
        ("Sorry, I cannot.", False),
    ],
)
def test_functions_are_run_against_their_tests(fields, reply, passed):
    task = make("humaneval", **fields["humaneval"])
    found = [one.turns[0] for one in every(task)]
    turn = next(one for one in found if one.meta["function"] == "add1")
    assert task.score(turn, reply) == passed
    assert program(turn, reply).endswith("check(add1)\n")


def test_problems_of_a_long_reply_go_on_behind_the_examples(fields):
    task = make("longgenbench", **fields["longgenbench"])
    for episode in every(task, turns=3):
        (turn,) = episode.turns
        assert episode.context.startswith("Examples:\n\nQuestion_1:\nAnn has 100")
        assert "Question_2:\n" in episode.context and "Answer_2:\n" in episode.context
        assert turn.question.startswith("Following Question:\n\nQuestion_3:\n")
        assert "Question_5:\n" in turn.question and "Question_6" not in turn.question
        assert turn.answer.startswith("Answer_3:\n")
        parts = [part for part in turn.question.split("\n\n") if part][1:]
        assert [*map(len, parts)] == sorted(map(len, parts))
        half = turn.answer.partition("Answer_5")[0]
        assert task.score(turn, half) == pytest.approx(2 / 3)
        assert task.answered(turn, half).coverage == pytest.approx(2 / 3)


def test_long_replies_of_choices(fields, tmp_path):
    for source, extra in (("mmlu", {}), ("csqa", {})):
        given = fields[source]
        shots = given.get("shots_path", "")
        task = make(
            "longgenbench",
            source=source,
            path=given["path"],
            exemplars=shots,
            shots=2,
            problems=3,
            **extra,
        )
        found = every(task)
        assert len(found) == (2 if source == "mmlu" else 3)
        for one in found:
            (turn,) = one.turns
            assert task.score(turn, turn.answer) == 1
            assert "(A) " in turn.question
            assert turn.question.split("\n\n")[1] not in one.context
    with pytest.raises(ValueError, match="asks 13 problems at once"):
        make("longgenbench", **{**fields["longgenbench"], "problems": 13}).drafts(1)
    with pytest.raises(ValueError, match="has 4 worked examples; `shots` asks for 5"):
        make("longgenbench", **{**fields["longgenbench"], "shots": 5}).drafts(1)


@pytest.mark.parametrize("folder", [True, False])
def test_examples_of_long_replies_are_of_the_other_split(tmp_path, folder):
    path = write(tmp_path / "test.jsonl", published.gsm8k(8))
    given = {"path": str(tmp_path) if folder else path, "problems": 4, "shots": 2}
    with pytest.raises(ValueError, match="'train'"):
        make("longgenbench", **given).drafts(1)
    write(tmp_path / "train.jsonl", published.gsm8k(4, 100))
    drafts = make("longgenbench", **given).drafts(1)
    assert len(drafts) == 2
    assert "Ann has 101 nuts" in drafts[0].make(2).context


def test_the_published_scorer_takes_9_of_700_from_a_perfect_model(
    shared_data, monkeypatch
):
    if not (shared_data / "eval" / "gsm8k" / "test.jsonl.gz").is_file():
        pytest.skip("no GSM8K")
    monkeypatch.setenv("KVJAX_DATA", str(shared_data))
    task = make("longgenbench", order="file", scorer="published")
    turns: list = [one.make(one.size).turns[0] for one in task.drafts(1)[:20]]
    right = [35 * task.score(turn, turn.answer) for turn in turns]
    assert sum(map(round, right)) == 691
    corrected = make("longgenbench", order="file")
    assert all(corrected.score(turn, turn.answer) == 1 for turn in turns)
    one = make("longgenbench", order="file", scorer="published", problems=1)
    turns = [draft.make(0).turns[0] for draft in one.drafts(1)]
    said = [f"Answer_1:\nThe answer is {t.meta['wanted'][0]}.\n\n" for t in turns]
    scores = [one.score(t, reply) for t, reply in zip(turns, said, strict=True)]
    assert (sum(scores), len(scores)) == (1305, 1319)
