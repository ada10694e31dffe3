"""Tasks of files: the choice of items, long ones, what is asked and what is right."""

from typing import Any

import pytest

from kvjax.eval.tasks import TRAIN, Item, make_task, stream
from kvjax.eval.tasks.base import characters
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


def test_an_unknown_metric_is_refused_at_once():
    with pytest.raises(ValueError, match="rouge_l.*Did you mean 'rouge_l'"):
        make("dataset", metric="rouge-l")


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
        ({"task": "mine"}, "x.jsonl.*mine.*Give `metric`"),
        ({"max_new_tokens": None}, "line 2.*Set `new_tokens`"),
        ({"max_new_tokens": "many"}, "line 2: `max_new_tokens`"),
        ({"answer": []}, "line 2: `answer` is empty, as in 1 of 3.*`unanswered: leave"),
        ({"answer": None}, "line 2: `answer` is empty"),
        ({"answer": ["x", ""]}, "line 2: `answer` must be texts"),
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


def test_rows_without_an_answer_can_be_left_out(tmp_path):
    rows = [{**row, "length": "short"} for row in published.ruler(4)]
    rows[1] = {**rows[1], "answer": "", "question": None}
    path = write(tmp_path / "x.jsonl", rows)
    assert len(make("dataset", path=path, unanswered="leave_out").drafts(1)) == 3
    path = write(tmp_path / "x.jsonl", [{**one, "answer": None} for one in rows])
    with pytest.raises(ValueError, match="empty, as in all rows"):
        make("dataset", path=path, unanswered="leave_out").drafts(1)
    rows = [{**rows[0], "question": None}, {**rows[2]}]
    drafts = make("dataset", path=write(tmp_path / "x.jsonl", rows)).drafts(1)
    assert drafts[0].make(9).turns[0].question == ""
    assert drafts[0].make(9).turns[0].meta["length"] == "short"
    del rows[1]["question"]
    with pytest.raises(ValueError, match="line 2: there is no column `question`"):
        make("dataset", path=write(tmp_path / "x.jsonl", rows)).drafts(1)


def test_what_a_metric_needs_is_looked_at_before_anything_is_computed(tmp_path):
    row = {**published.ruler(1)[0], "task": "trec", "answer": "Date"}
    path = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(ValueError, match="line 1: .*all_classes"):
        make("dataset", path=path).drafts(1)
    row["all_classes"] = ["Date", "Place"]
    task = make("dataset", path=write(tmp_path / "x.jsonl", [row]))
    (episode,) = every(task)
    assert task.score(episode.turns[0], "Date or Place") == 0.5


def test_items_of_files_are_items(fields):
    (item,) = make("gsm8k", **fields["gsm8k"]).generate(0, 1, EVERY)
    assert isinstance(item, Item) and item.meta["index"] == 0


def test_rows_of_each_task_are_scored_apart(tmp_path):
    path = published.write(tmp_path / "test.jsonl", published.ruler())
    parts = make_task("dataset", path=path).parts()
    assert sorted(parts) == ["niah_multivalue", "qa_1"]
    assert parts["qa_1"].episodes(0, 1, 10**6)[0].turns[0].meta["kind"] == "qa_1"
    alone = make_task("dataset", path=path, task="qa_1")
    assert alone.parts() == {"": alone}


@pytest.mark.parametrize("path", ["x" * 300, "x" * 5000 + ".jsonl", "a/" * 3000])
@pytest.mark.parametrize(
    ("name", "field"),
    [("niah_single_2", "essays"), ("cwe", "words"), ("lines", "words")]
    + [(name, "path") for name in ("qa_1", "qa_2", "lines", "gsm8k")],
)
def test_paths_that_are_too_long_are_told(path, name, field):
    said = r"too long|there is no file|must be a file"
    with pytest.raises(ValueError, match=said):
        task = make(name, **{field: path})
        task.files()
        task.episodes(0, 1, 3000)


def test_files_that_change_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows" / "4096").mkdir(parents=True)
    for fields, name in (
        ({"path": "~/x.jsonl"}, "x.jsonl"),
        ({"path": str(tmp_path / "rows"), "config": "4096"}, "rows/4096/test.jsonl"),
    ):
        for count in (3, 5):
            write(tmp_path / name, published.ruler(count))
            task = make("dataset", metric="ruler", task="niah_multivalue", **fields)
            assert sum(len(d.make(9).turns) for d in task.drafts(1)) == count - 2
