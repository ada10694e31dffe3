"""Tasks as rows of training: the tokens that an evaluation reads and wants."""

import numpy as np
import pytest

from kvjax.eval.framing import framing
from kvjax.eval.tasks import TRAIN, make_task, stream
from kvjax.eval.text import Tokenizer
from kvjax.train.data.tasks import TaskRows
from kvjax.train.data.tokenizer import build_tokenizer
from kvjax.train.data.words import CHARACTERS, Words

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def words(template: str | None) -> Words:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return Words(tokenizer, len(tokenizer))


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("turns", [1, 3])
def test_a_row_in_words_is_what_an_evaluation_reads(template, turns):
    mine, task = words(template), make_task("niah_multikey_1", haystack="noise")
    rows = TaskRows(task, mine, 0.1)
    episode = task.episode(stream(TRAIN, "x", 0, 0), 3, turns)
    row = rows.row(episode)
    frame = framing(Tokenizer(mine.tokenizer, mine.vocab_size), task)
    read, before = list(frame.prompt(episode)), None
    assert row.context == len(read)
    for turn in episode.turns:
        read += frame.asked(turn, before)
        before = turn
    last = episode.turns[-1].answer
    whole = [*read, *mine.encode(last)]
    assert row.tokens[: len(whole)].tolist() == whole
    assert len(row.tokens) == len(whole) + 1  # and an end, which is taught
    assert row.tokens[-1] == frame.ends[-1] and row.weights[-1] == 1.0
    question = frame.prompt(episode, aware=True)
    assert row.prompt == len(question)
    text = mine.decode(row.tokens[row.answers].tolist())
    assert text.replace("<eos>", "") == "".join(t.answer for t in episode.turns)
    assert set(np.unique(row.weights)) == {np.float32(0.1), np.float32(1.0)}


def test_rows_in_words_fill_their_width_with_fewer_questions_where_they_must():
    task = make_task("kv_retrieval")
    rows = TaskRows(task, words(TEMPLATE))
    rng = stream(TRAIN, "x", 0, 1)
    for width in (500, 1200):
        row = rows.fitting(rng, width, turns=6)
        assert 0.5 * width < len(row.tokens) <= width
    with pytest.raises(ValueError, match="does not fit"):
        rows.fitting(rng, 100, turns=2)


def test_records_are_read_as_ever():
    task = make_task("recall", value_length=4)
    row = TaskRows(task, CHARACTERS).fitting(stream(TRAIN, "x", 0, 2), 200)
    text = CHARACTERS.decode(row.tokens.tolist())
    assert text.count("? [") == 1 and text.endswith("]")
    assert not row.answers[-1] and row.tokens[0] == 1
    assert row.prompt == int(np.argmax(row.answers))
