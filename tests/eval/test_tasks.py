"""Generated tasks: deterministic, disjoint from training, self-consistent, readable."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.eval.tasks import HELD_OUT, STOP, TASKS, TRAIN, make_task, stream
from kvjax.eval.tasks.chain import OPERATIONS, Chain, apply
from kvjax.eval.tasks.fact import FACTS
from kvjax.eval.tasks.induction import Induction
from kvjax.eval.tasks.recall import VALUE_LENGTHS, Recall
from kvjax.eval.tasks.records import RecordTask, before_stop

NAMES = sorted(name for name, one in TASKS.items() if issubclass(one, RecordTask))
names = st.sampled_from(NAMES)
lengths = st.integers(100, 2048)
seeds = st.integers(0, 10_000)


@given(name=names, length=lengths, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_generation_is_deterministic_and_within_length(name, length, seed):
    task = make_task(name)
    items = task.generate(seed, 3, length)
    assert items == task.generate(seed, 3, length)
    assert items[:2] == task.generate(seed, 2, length)
    for item in items:
        size = len(item.prompt + item.answer)
        assert length - 60 <= size <= length


@given(name=names, length=lengths, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_items_are_readable_and_end_with_the_stop(name, length, seed):
    task = make_task(name)
    for item in task.generate(seed, 3, length):
        text = item.prompt + item.answer
        assert re.fullmatch(r"[ -~\n]*", text)
        assert item.answer.endswith(STOP)
        assert item.answer.count(STOP) == 1
        assert 2 <= len(item.answer) <= task.max_new_tokens
        assert item.meta["task"] == name


@given(name=names, length=lengths, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_scores_of_right_and_wrong_replies(name, length, seed):
    task = make_task(name)
    for item in task.generate(seed, 3, length):
        assert task.score(item, item.answer) == 1.0
        assert task.score(item, item.answer + " what follows") == 1.0
        assert task.score(item, "") == 0.0
        assert task.score(item, "no idea" + STOP) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_training_and_held_out_streams_are_disjoint(name):
    task = make_task(name)
    items = task.generate(0, 100, 512)
    held_out = {item.prompt for item in items}
    assert len(held_out) == len(items)
    train = {
        task.episode(stream(TRAIN, name, 0, index), 512).context for index in range(100)
    }
    assert not any(
        prompt.startswith(context) for context in train for prompt in held_out
    )
    assert stream(TRAIN, name, 0, 0).random() != stream(HELD_OUT, name, 0, 0).random()


@pytest.mark.parametrize("name", NAMES)
def test_too_short_lengths_are_refused(name):
    fields = {"fact": {}, "batch": {"problems": 8}}.get(name, {})
    with pytest.raises(ValueError, match="length"):
        make_task(name, **fields).generate(0, 1, 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "wrong", [{"length": math.nan}, {"count": 1.5}, {"count": "3"}, {"seed": None}]
)
def test_counts_are_counts(name, wrong):
    given = {"seed": 0, "count": 2, "length": 512} | wrong
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be an integer"):
        make_task(name).generate(**given)


@given(seed=seeds, width=st.sampled_from(VALUE_LENGTHS))
@settings(max_examples=40, deadline=None)
def test_recall_value_stands_beside_its_key(seed, width):
    task = Recall(value_length=width)
    (item,) = task.generate(seed, 1, 600)
    record = f"[{item.meta['key']}{item.answer}"
    assert item.context.count(record) == 1
    assert item.context.count(f"[{item.meta['key']}") == 1
    assert len(item.meta["value"]) == width


def test_recall_keys_grow_with_length():
    task = Recall(value_length=4)
    counts = [task.generate(0, 1, n)[0].meta["keys"] for n in (128, 512, 2048)]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_stands_at_its_depth(depth):
    for item in Recall(value_length=4, keys=1, depth=depth).generate(3, 20, 1000):
        at = item.context.index(f"[{item.meta['key']}") / len(item.context)
        assert abs(at - depth) < 0.05


@given(seed=seeds, steps=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_chain_reply_follows_its_records(seed, steps):
    (item,) = Chain(steps=steps).generate(seed, 1, 400)
    records = dict(re.findall(r"\[(\d):([^\]]*)\]", item.context))
    value = int(records["0"])
    for number in range(1, steps + 1):
        operation = records[str(number)]
        assert operation in OPERATIONS
        result = apply(value, operation)
        assert f"{number}:{operation} {value}{operation}={result};" in item.answer
        value = result
    assert item.meta["value"] == str(value)
    wrong = item.answer.replace(f"={value};{steps + 1}", f"={(value + 1) % 10};{steps}")
    assert Chain(steps=steps).score(item, wrong) == 0.0


@given(seed=seeds, shots=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_induction_rule_is_in_the_shots(seed, shots):
    (item,) = Induction(shots=shots).generate(seed, 1, 400)
    lines = re.findall(r"\[((?:\d:[a-z] ?){3})\]\n", item.context)
    assert len(lines) == shots
    rule = {}
    for digit, letter in (pair.split(":") for line in lines for pair in line.split()):
        assert rule.setdefault(digit, letter) == letter
    asked = re.findall(r"(\d):\?", item.question)
    assert item.answer == " ".join(f"{d}:{rule[d]}" for d in asked) + STOP


def test_batch_score_is_the_share_of_right_problems():
    task = make_task("batch", problems=4)
    (item,) = task.generate(0, 1, 300)
    first, rest = item.answer.split(";", 1)
    wrong = first[:-1] + str((int(first[-1]) + 1) % 10)
    assert task.score(item, f"{wrong};{rest}") == 0.75
    assert task.score(item, rest) == 0.75


def test_fact_leak_moves_the_sign_into_the_question():
    plain, leaky = (
        make_task("fact", leak=leak).generate(0, 1, 200)[0] for leak in (False, True)
    )
    assert plain.prompt + plain.answer == leaky.prompt + leaky.answer
    assert leaky.answer == FACTS[leaky.meta["word"]] + STOP


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="'recall'"):
        make_task("recal")
    with pytest.raises(ValueError, match="'value_length'"):
        make_task("recall", value_lenght=4)
    with pytest.raises(ValueError, match="redundancy"):
        make_task("recall", redundancy=2.0)
    for constant in ("name", "unit", "stop", "paths"):
        with pytest.raises(ValueError, match=r"no field.*expected one of \['redun"):
            make_task("recall", **{constant: "a"})


@pytest.mark.parametrize(
    ("reply", "before", "through"),
    [("", "", ""), ("ab", "ab", "ab"), ("ab]c]", "ab", "ab]"), ("]", "", "]")],
)
def test_a_reply_ends_with_its_first_stop(reply, before, through):
    assert before_stop(reply) == before
    assert make_task("fact").cut(reply) == through
