"""Tasks of files: the choice of items, long ones, what is asked and what is right."""

import json
from typing import Any

import pytest

from kvjax.eval.tasks import TRAIN, Item, make_task, stream
from kvjax.eval.tasks.base import characters
from kvjax.eval.tasks.humaneval import program
from tests.eval import published
from tests.eval.published import write


def make(name: str, **fields: Any) -> Any:
    """A task of files, whatever it has beside what all tasks have."""
    return make_task(name, **fields)


NAMES = ("csqa", "dataset", "gsm8k", "humaneval", "longgenbench", "mmlu")
EVERY = 10**6


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return published.files(tmp_path_factory.mktemp("published"))


@pytest.fixture
def task(fields, request):
    return make(request.param, **fields[request.param])


def every(task, turns=1, **others):
    count = len(task.drafts(turns))
    return task.episodes(1, count, EVERY, turns=turns, **others)


@pytest.mark.parametrize("task", NAMES, indirect=True)
def test_items_are_drawn_by_a_seed_and_none_twice(task):
    found = every(task)
    assert found == every(task)
    assert found[:2] == task.episodes(1, 2, EVERY)
    asked = [one.turns[0].question for one in found]
    assert len(set(asked)) == len(found)
    others = [
        [one.turns[0].question for one in task.episodes(seed, len(found), EVERY)]
        for seed in range(4)
    ]
    assert all(sorted(one) == sorted(asked) for one in others)
    assert len(set(map(tuple, others))) > 1
    assert task.generate(1, 1, EVERY)[0].context == found[0].context


@pytest.mark.parametrize("task", NAMES, indirect=True)
def test_perfect_replies_score_one_and_nonsense_nothing(task):
    for one in every(task)[:3]:
        (turn,) = one.turns
        assert task.score(turn, turn.answer) == 1
        assert task.score(turn, "nonsense") == 0
        assert task.score(turn, "") == 0
        assert (turn.max_new_tokens or 0) > 0
        assert task.max_new_tokens > 0


@pytest.mark.parametrize("task", NAMES, indirect=True)
def test_fewer_items_than_asked_for_are_told(task):
    count = len(task.drafts(1))
    with pytest.raises(ValueError, match=f"has {count} items; {count + 1} are asked"):
        task.episodes(1, count + 1, EVERY)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_too_long_is_refused_left_out_or_cut(fields, name):
    sizes = sorted(characters(one) for one in every(make(name, **fields[name])))
    length = sizes[len(sizes) // 2]
    over = sum(size > length for size in sizes)
    made = {
        long: make(name, **fields[name], long=long)
        for long in ("refuse", "leave_out", "cut")
    }
    if not over:
        length, over = sizes[0] - 1, len(sizes)
    said = f"{over} of {len(sizes)} items do not fit.*{length}.*needs {sizes[-1]}"
    with pytest.raises(ValueError, match=said):
        every_of(made["refuse"], len(sizes), length)
    for episode in every_of(made["leave_out"], len(sizes) - over, length):
        assert characters(episode) <= length
    with pytest.raises(ValueError, match=f"{len(sizes) - over} of {len(sizes)} items"):
        every_of(made["leave_out"], len(sizes) - over + 1, length)
    cut = every_of(made["cut"], len(sizes), length)
    assert all(characters(episode) <= length for episode in cut)
    assert sum("cut" in episode.turns[0].meta for episode in cut) == over
    with pytest.raises(ValueError, match="does not fit into a length of 5: it needs"):
        every_of(made["cut"], len(sizes), 5)


def every_of(task, count, length):
    return task.episodes(1, count, length)


@pytest.mark.parametrize("task", NAMES, indirect=True)
def test_nothing_is_trained_on_what_is_held_out(task):
    with pytest.raises(ValueError, match="held out"):
        task.episode(stream(TRAIN, task.name, 0, 0), 3)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_file_the_field_is_named(name, fields, monkeypatch, tmp_path):
    others = {"allow_code": True} if name == "humaneval" else {}
    monkeypatch.delenv("KVJAX_DATA", raising=False)
    with pytest.raises(ValueError, match="needs `path`"):
        make(name, **others).episodes(0, 1, EVERY)
    if name != "dataset":
        monkeypatch.setenv("KVJAX_DATA", str(tmp_path))
        with pytest.raises(ValueError, match="is not there"):
            make(name, **others).episodes(0, 1, EVERY)


def test_rows_with_one_context_are_turns_of_one_episode(fields):
    task = make("dataset", **fields["dataset"])
    found = every(task, turns=2)
    assert [len(one.turns) for one in found] == [2] * 6
    assert len({one.context for one in found}) == 6
    assert len(every(task, turns=1)) == 12
    turns = [turn for one in found for turn in one.turns]
    assert {turn.prefix for turn in turns} == {"Answer:"}
    assert {turn.max_new_tokens for turn in turns} == {24}
    kinds = {turn.meta["kind"]: turn.meta["metric"] for turn in turns}
    assert kinds == {
        "niah_multivalue": "string_match_all",
        "qa_1": "string_match_part",
    }
    first = next(turn for turn in turns if turn.meta["kind"] == "niah_multivalue")
    assert task.score(first, first.answers[0]) == 0.5
    assert make("dataset", **fields["dataset"], new_tokens=7).max_new_tokens == 7


def test_rows_of_one_kind_alone(fields):
    task = make("dataset", **fields["dataset"], task="qa_1")
    assert len(task.drafts(1)) == 2
    with pytest.raises(ValueError, match="no row has `task` 'qa_2'.*Did you mean"):
        make("dataset", **fields["dataset"], task="qa_2").drafts(1)


def test_a_cut_takes_the_middle(fields):
    task = make("dataset", **fields["dataset"], long="cut")
    (whole,) = task.episodes(3, 1, EVERY)
    (cut,) = task.episodes(3, 1, 300)
    size = len(cut.context)
    assert 250 < characters(cut) <= 300
    half = size - size // 2
    assert cut.context == whole.context[:half] + whole.context[-(size // 2) :]
    assert cut.turns[0].meta["cut"] == len(whole.context) - size
    assert cut.turns[0].question == whole.turns[0].question


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "mine"}, "mine.*Give `metric`"),
        ({"max_new_tokens": None}, "line 2.*Set `new_tokens`"),
        ({"max_new_tokens": "many"}, "line 2: `max_new_tokens`"),
        ({"answer": []}, "line 2: `answer` must be"),
        ({"context": 3}, "line 2: `context` must be a text"),
        ({"context": None}, "line 2: `context` is empty"),
        ({"task": "trec"}, "trec"),
    ],
)
def test_faulty_rows_are_named(tmp_path, change, said):
    rows = [*published.ruler(3)]
    rows[1] = {**rows[1], **change}
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match=said):
        make("dataset", path=path).drafts(1)


def test_what_a_metric_needs_is_looked_at_before_anything_is_computed(tmp_path):
    row = {**published.ruler(1)[0], "task": "trec", "answer": "Date"}
    path = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(ValueError, match="line 1: .*all_classes"):
        make("dataset", path=path).drafts(1)
    row["all_classes"] = ["Date", "Place"]
    task = make("dataset", path=write(tmp_path / "x.jsonl", [row]))
    (episode,) = every(task)
    assert task.score(episode.turns[0], "Date or Place") == 0.5


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
    with pytest.raises(ValueError, match="needs `shots_path`.*train.jsonl"):
        make("gsm8k", path=path, shots=2).drafts(1)
    write(tmp_path / "train.jsonl", published.gsm8k(4, 100))
    for place in (path, str(tmp_path)):
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
    import gzip

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


def test_items_of_files_are_items(fields):
    (item,) = make("gsm8k", **fields["gsm8k"]).generate(0, 1, EVERY)
    assert isinstance(item, Item) and item.meta["index"] == 0
