"""What replies say in the end: numbers, letters, boxes, answers by their numbers."""

import dataclasses
import time
from fractions import Fraction

import pytest

from kvjax.eval.metrics import METRICS
from kvjax.eval.metrics.answers import said_letter, said_number
from kvjax.eval.metrics.boxed import last_box, same_form
from kvjax.eval.metrics.long_reply import corrected, published
from kvjax.eval.metrics.numbers import number, numbers
from kvjax.eval.tasks import Turn


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("5-3=2", [5, 3, 2]),
        ("x = -2, then $1,234.50.", [-2, Fraction("1234.5")]),
        ("-$5 or \u22127", [-5, -7]),
        ("1,2,3 and 1,2345", [1, 2, 3, 1, 2345]),
        ("18.00. .5", [18, Fraction(1, 2)]),
        ("none", []),
    ],
)
def test_numbers_in_texts(text, values):
    assert numbers(text) == values


def test_numbers_by_value():
    assert number("$1,234.00") == number("1234") == 1234
    assert number("\u22123") == number(" - 3") == -3
    for text in ("", "3 4", "1,23", "1e5", "x", "9" * 400, "１"):
        assert number(text) is None


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("He has 3. The answer is $1,234.00. Then 7.", 1234),
        ("Answer: 5 + 3 = 8 apples", 8),
        ("the answer is -4", -4),
        ("Answer: First she has 3 nuts. Then 4 more. The answer is **7**.", 7),
        ("The answer is found by adding 3 and 4. So the answer is 7, not 9.", 7),
        ("The answer is that she has 18 nuts. Of 20.", 18),
        ("Answer: She has 3 nuts and then 4", 4),
        (r"The answer is \(\boxed{1,234}\).", 1234),
        ("The answer is clear.\nThe answer is 6", 6),
        ("steps 3\n#### 12", 12),
        (r"3 so \boxed{9}. Done in 2 steps", 9),
        ("first 3, then 5.", 5),
        ("no number", None),
    ],
)
def test_numbers_that_replies_end_in(reply, value):
    assert said_number(reply) == value


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        (" B", "B"),
        ("(C) since A is wrong", "C"),
        ("A or so", "A"),
        ("A dog, so B", "B"),
        ("A", "A"),
        ("A. bank", "A"),
        ("The answer is (D), not A.", "D"),
        ("The answer is A because B is wrong", "A"),
        ("Answer: A dog sits there, so **B**", "B"),
        ("Answer: C", "C"),
        ("I'd say Done", None),
        ("E", None),
        ("Not (A) but (B)", "B"),
        ("", None),
    ],
)
def test_letters_that_replies_choose(reply, letter):
    assert said_letter(reply, "ABCD") == letter


def test_boxes_and_their_forms():
    assert (
        last_box(r"\boxed{a} \boxed{\frac{1}{\sqrt{2}}} {x}") == r"\frac{1}{\sqrt{2}}"
    )
    assert last_box(r"\boxed{a} \boxed{b") == "a"
    assert last_box("a}") is None
    assert last_box(r"} \boxed{\boxed{7}, {8}} {") == "7"
    assert last_box(r"\boxed{" * 20_000) is None
    for one, other in (
        (r"\text{Evelyn}", "Evelyn"),
        (r"90^\circ", "90"),
        (r"\$18.00", "18"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"x \in [-2,7]", r"x\in[-2,7]"),
        (r"\sqrt2", r"\sqrt{2}"),
    ):
        assert same_form(one) == same_form(other)
    assert same_form("1,2") != same_form("12")


@pytest.mark.parametrize("part", ["\n", "A ", "answer is ", "{", "boxed{", "1,", "'"])
def test_replies_that_repeat_themselves_take_no_time(part):
    reply = "Answer_9:" + part * 10_000
    asked = Turn(question="", answer="C", meta={})
    began = time.monotonic()
    assert corrected(["2"], 9, reply).accuracy == 0
    assert METRICS["choice"](asked, reply) == METRICS["boxed"](asked, reply) == 0
    cloze = dataclasses.replace(asked, answer="{'a': 'b'}")
    assert METRICS["cloze_exact"](cloze, reply) == 0
    assert time.monotonic() - began < 5


def test_a_long_reply_is_read_by_its_numbers():
    reply = (
        "Answer_9: it is 1,000\n\nmore. The answer is 18.00.\n\nAnswer_11:\nThe answer "
        "is -3.\n\nAnswer_12:\nno idea\n\nQuestion_13:\nAnswer_9:\nThe answer is 5.\n\n"
    )
    done = corrected(["18", "7", "-3", "4"], 9, reply)
    assert done.right == (True, None, True, None)
    assert (done.accuracy, done.coverage) == (0.5, 0.5)
    assert done.accuracy_given_answered == 1
    assert corrected(["1"], 9, "").accuracy_given_answered is None
    many = corrected([str(i) for i in range(20)], 0, "Answer_0: 0 Answer_2: 3")
    assert many.by_decile == (0.5, *[0.0] * 9)
    assert corrected(["1"], 1, "Answer_1: 1").by_decile[-1] == 1
    letters = corrected(["B", "C"], 6, "Answer_6:\n(B)\n\nAnswer_7: (A)", "ABCD")
    assert letters.right == (True, False)


@pytest.mark.parametrize(
    ("wanted", "reply", "score"),
    [
        (["1,000"], "Answer_9:\n1,000\n\n", 0),  # commas of the right answer stay
        (["-3"], "Answer_9:\n3\n\n", 1),  # no sign
        (["18"], "Answer_9:\n18.00\n\n", 0),
        (["18"], "Answer_9: 18", 0),  # on the line of its mark
        (["18"], "Answer_9:\nfirst 3\n\n18\n\n", 0),  # a blank line ends it
        (["1", "2"], "Answer_10:\n2\n\n", 0),  # by place
        (["1", "2", "3"], "Answer_9:\n1\n\n", 1),  # the rest does not count
    ],
)
def test_the_published_scorer_keeps_its_faults(wanted, reply, score):
    assert published(wanted, reply) == score
