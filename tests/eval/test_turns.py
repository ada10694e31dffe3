"""Several questions about one context, and choices by their likelihood."""

import dataclasses
from typing import ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.eval import harness, tasks
from kvjax.eval.plan import plan
from kvjax.eval.questions import QuestionGroup
from kvjax.eval.results import load_rows
from kvjax.eval.rows import read_rows
from kvjax.eval.tasks import RecordTask, Turn
from kvjax.eval.tasks.recall import Recall
from tests.eval import tiny

TURNS = {"value_length": 1, "keys": 3}


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def config(**entry):
    task = {"name": "recall", "fields": TURNS, "turns": 3, **entry}
    return tiny.config(tasks=[task], keeps=[0.5], items=3, batch=2, lengths=[120])


def by_hand(model, tokenizer, group: QuestionGroup, c, item: int, *, session: bool):
    """Replies to the questions of one episode, one call after the other."""
    tokens = jnp.asarray([group.prompts[item]])
    logits, cache = kvjax.prefill(model, tokens, None, c, max_new_tokens=150)
    out, own = [], []
    for asked in group.asked[item]:
        asked = [*own, *asked]
        logits, now = kvjax.extend(model, cache, jnp.asarray([asked]))
        made = kvjax.generate_from(model, now, logits[:, -1], max_new_tokens=3)
        text = tokenizer.decode(np.asarray(made.tokens[0]), skip_special_tokens=True)
        out.append(text[: text.find("]") + 1] if "]" in text else text)
        own = [] if group.golden else list(group.tokenizer.encode(out[-1]))
        cache = now if session else cache
    return out


@pytest.mark.parametrize(
    ("mode", "golden"), [("requests", True), ("session", True), ("session", False)]
)
def test_turns_are_those_of_calls_by_hand(model, tokenizer, tmp_path, mode, golden):
    made = config(mode=mode, golden=golden)
    rows = harness.run(model, tokenizer, made, tmp_path / "run")
    assert [row["turn"] for row in rows] == [1, 2, 3] * 3
    assert len(load_rows(tmp_path / "run")) == 9
    planned = plan(model.config, tokenizer, made)
    (group,) = planned.groups
    assert isinstance(group, QuestionGroup)
    method = planned.methods[-1]
    c = method.at(0.5, "query_agnostic")
    for item in (0, 2):
        want = by_hand(model, tokenizer, group, c, item, session=mode == "session")
        for turn in (1, 2, 3):
            cell = f"recall-120-query_agnostic-snapkv-keep0.5-turn{turn}"
            found = read_rows(tmp_path / "run" / "items" / f"{cell}.parquet")
            assert found[item]["reply"] == want[turn - 1]
    assert harness.run(model, tokenizer, made, tmp_path / "run") == rows


def test_a_session_reads_replies_between_the_questions(model, tokenizer):
    (group,) = plan(model.config, tokenizer, config(mode="session")).groups
    assert isinstance(group, QuestionGroup)
    first, second, _ = group.episodes[0].turns
    said = group.tokenizer.decode(group.asked[0][1])
    assert said == first.answer + second.question
    (group,) = plan(model.config, tokenizer, config()).groups
    assert isinstance(group, QuestionGroup)
    assert group.tokenizer.decode(group.asked[0][1]) == second.question


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen(RecordTask):
    """Recall by choice."""

    name: ClassVar[str] = "chosen"

    @property
    def max_new_tokens(self) -> int:
        return 4

    def episode(self, rng, size, turns=1):
        made = Recall(value_length=2).episode(rng, size, turns)
        turns = tuple(
            dataclasses.replace(t, choices=(t.answer, ":zz]", ":q]"))
            for t in made.turns
        )
        return dataclasses.replace(made, turns=turns)

    def score(self, item: Turn, reply: str) -> float:
        return float(reply == item.answer)


@pytest.mark.parametrize("visibility", ["query_agnostic", "query_aware"])
def test_choices_are_those_of_the_plain_model(
    model, tokenizer, tmp_path, monkeypatch, visibility
):
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "chosen": Chosen})
    monkeypatch.setattr("kvjax.eval.asking.TASKS", tasks.TASKS)
    task = {"name": "chosen", "fields": {}}
    made = tiny.config(tasks=[task], items=3, visibility=[visibility], keeps=[1.0])
    rows = harness.run(model, tokenizer, made, tmp_path / "run")
    (group,) = plan(model.config, tokenizer, made).groups
    assert isinstance(group, QuestionGroup)
    assert all(len(asked[0]) >= 1 for asked in group.asked)
    none = rows[0]["cell"]
    found = read_rows(tmp_path / "run" / "items" / f"{none}.parquet")
    for item, row in enumerate(found):
        read = [*group.prompts[item], *group.asked[item][0]]
        likely = []
        for choice in group.episodes[item].turns[0].choices:
            tail = group.tokenizer.encode(choice)
            tokens = jnp.asarray([[*read, *tail]])
            logits, _ = kvjax.extend(
                model,
                kvjax.prefill(model, tokens[:, :1], None, max_new_tokens=120)[1],
                tokens[:, 1:],
            )
            scores = jax.nn.log_softmax(logits[0, len(read) - 2 : -1])
            likely.append(float(scores[np.arange(len(tail)), np.array(tail)].sum()))
        best = int(np.argmax(likely))
        assert row["reply"] == group.episodes[item].turns[0].choices[best]
    # All is kept: the choices are the same.
    assert {row["agreement"] for row in rows} == {1.0}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"turns": 1, "mode": "session"}, "are of several turns"),
        ({"turns": 0}, "turns"),
        ({"mode": "both"}, "requests"),
        ({"visibility": ["query_aware"]}, "serves no other"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, tokenizer, entry, said):
    with pytest.raises(ValueError, match=said):
        plan(model.config, tokenizer, config(**entry))
