"""Every task in words: deterministic, disjoint from training, as long as allowed."""

import dataclasses
import re

import pytest

from kvjax.eval.tasks import (
    HELD_OUT,
    TASKS,
    TRAIN,
    Episode,
    RecordTask,
    Task,
    make_task,
    stream,
)
from kvjax.eval.tasks.dataset import Dataset
from kvjax.eval.tasks.longgenbench import LongGenBench
from kvjax.eval.tasks.shots import FewShot
from tests.eval.languages import essay, fields_of

OTHERS = (RecordTask, Dataset, FewShot, LongGenBench)
"""Tasks that have tests of their own: `test_tasks`, `test_file_tasks`."""
NAMES = sorted(name for name, one in TASKS.items() if not issubclass(one, OTHERS))
READ = {name for name in NAMES if name == "scbench" or name.startswith("babilong")}
"""Tasks whose items are in files, as long as they are, and not trained on."""
EXACT = {"scbench", "scbench_kv", "scbench_prefix_suffix"}
"""Tasks that score letter by letter."""
FOUND_IN_CONTEXT = {*NAMES} - READ
"""Tasks whose references stand in the context."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Task]:
    fields = fields_of(tmp_path_factory.mktemp("language"))
    return {name: make_task(name, **fields.get(name, {})) for name in NAMES}


def words(episode: Episode) -> int:
    """A measure that is not in characters."""
    texts = (t.question + t.prefix + t.answer for t in episode.turns)
    return len(" ".join([episode.context, *texts]).replace("-", " ").split())


@pytest.mark.parametrize("name", NAMES)
def test_episodes_are_the_same_again_whatever_their_number(name, tasks):
    task = tasks[name]
    three = task.episodes(5, 3, 600, words, turns=2)
    assert three == task.episodes(5, 3, 600, words, turns=2)
    assert three[:2] == task.episodes(5, 2, 600, words, turns=2)
    assert three != task.episodes(6, 3, 600, words, turns=2)


@pytest.mark.parametrize("name", sorted({*NAMES} - READ))
@pytest.mark.parametrize("length", [500, 2000])
def test_episodes_are_as_long_as_they_may_be(name, length, tasks):
    for episode in tasks[name].episodes(1, 2, length, words):
        assert 0.85 * length <= words(episode) <= length


@pytest.mark.parametrize("name", NAMES)
def test_perfect_replies_are_right_and_others_are_not(name, tasks):
    task = tasks[name]
    for episode in task.episodes(2, 2, 600, words, turns=3):
        for turn in episode.turns:
            assert task.score(turn, turn.answer) == 1
            again = turn.answer if name in EXACT else turn.answer.upper()
            assert task.score(turn, again + "\nand so on") == 1
            assert task.score(turn, "") == 0
            assert task.score(turn, " I do not know.") == 0
            assert turn.answers or turn.choices
            if name in FOUND_IN_CONTEXT:
                assert all(one in episode.context for one in turn.answers)


@pytest.mark.parametrize("name", NAMES)
def test_turns_ask_different_things(name, tasks):
    task = tasks[name]
    (episode,) = task.episodes(3, 1, 900, words, turns=3)
    assert len(episode.turns) == (3 if task.multi_turn else 1)
    assert len({one.question for one in episode.turns}) == len(episode.turns)


@pytest.mark.parametrize("name", sorted({*NAMES} - READ))
def test_training_and_held_out_streams_are_disjoint(name, tasks):
    task = tasks[name]
    kinds = {
        kind: {
            task.fitted(lambda i=i, k=kind: stream(k, name, 0, i), 600, words).context
            for i in range(5)
        }
        for kind in (TRAIN, HELD_OUT)
    }
    assert not kinds[TRAIN] & kinds[HELD_OUT]
    if type(task)._drawn is Task._drawn:
        assert kinds[HELD_OUT] == {
            one.context for one in task.episodes(0, 5, 600, words)
        }


@pytest.mark.parametrize("name", NAMES)
def test_lengths_that_hold_no_episode_are_refused(name, tasks):
    with pytest.raises(ValueError, match="length of 9"):
        tasks[name].episodes(0, 1, 9, words)


@pytest.mark.parametrize("name", sorted(READ))
def test_what_is_read_is_not_trained_on(name, tasks):
    with pytest.raises(ValueError, match="held out"):
        tasks[name].episode(stream(TRAIN, name, 0, 0), 100)


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_documented(name):
    text = "\n".join(base.__doc__ or "" for base in TASKS[name].__mro__)
    for field in dataclasses.fields(TASKS[name]):
        assert re.search(rf"\b{field.name}\b.*: ", text), field.name
    assert "Source: " in text


def test_the_page_of_tasks_is_current(repo):
    page = (repo / "docs/tasks.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| ", page.split("## How")[0], re.M)
    assert sorted(one for row in rows for one in re.findall("`(.+?)`", row)) == NAMES
    other = (repo / "docs/benchmarks_published.md").read_text().split("**Choice")[0]
    asked = {name for name, one in TASKS.items() if issubclass(one, OTHERS[1:])}
    assert {*re.findall(r"^\| `(.*?)` \| ", other, re.M)} == asked
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(code, {})  # noqa: S102 - of our own page


def test_variants_keep_their_names_and_take_fields():
    one, two = make_task("kv_retrieval"), make_task("scbench_kv")
    assert (one.name, two.name) == ("kv_retrieval", "scbench_kv")
    assert one != two and make_task("scbench_kv") == two
    same = make_task("scbench_kv", layout="lines")
    rng = (stream(TRAIN, "a", 0, 0) for _ in range(2))
    assert same.episode(next(rng), 3) == one.episode(next(rng), 3)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_read_are_known(name, tmp_path):
    fields = fields_of(tmp_path).get(name, {})
    if "words" in TASKS[name].__dataclass_fields__:
        fields = {**fields, "words": str(tmp_path / "words.txt")}
        (tmp_path / "words.txt").write_text("one")
    found = make_task(name, **fields).files()
    assert sorted(map(str, found.values())) == sorted(fields.values())


def test_files_that_are_found_are_known(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path))
    (tmp_path / "lm/gutenberg").mkdir(parents=True)
    (tmp_path / "lm/gutenberg/a.txt").write_text(essay())
    (tmp_path / "lm/gutenberg/read.me").write_text("not read")
    (tmp_path / "eval/babilong").mkdir(parents=True)
    facts_ = tmp_path / "eval/babilong/qa2_1k.jsonl.gz"
    facts_.write_bytes(b"")
    want = {
        "niah_single_2": [tmp_path / "lm/gutenberg/a.txt"],
        "babilong_qa2": [facts_],
        "niah_single_1": [],
    }
    for name, files in want.items():
        assert list(make_task(name).files().values()) == files
