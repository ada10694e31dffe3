"""Metrics of published benchmarks, against their definitions and their public code."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.eval.metrics import FAMILIES, METRICS, family_of, metric_names, perfect
from kvjax.eval.metrics.rouge import rouge_l
from kvjax.eval.tasks import Turn

CLASSES = ("number", "Other number", "Date")


def turn(*answers, **meta):
    return Turn(question="?", answer=answers[0], answers=answers, meta=meta)


REFERENCES = {
    "classification": turn("Other number", all_classes=CLASSES),
    "retrieval": turn("Paragraph 12"),
    "retrieval_zh": turn("段落12"),
    "count": turn("12"),
    "first_digits": turn("71432"),
    "word": turn("ab-1"),
    "last_integer": turn("-3"),
    "first_number": turn("4.5"),
    "running_values": turn("3", "-2", "10"),
    "choice": turn("B"),
    "code_choice": turn("J", "fetch_all"),
    "cloze_exact": turn('{"<mask-0>": "Bob Dylan", "<mask-1>": "Ely"}'),
    "cloze_partial": turn("{'<mask-0>': 'Bob Dylan'}"),
    "correct_answer_letter": turn("C"),
    "bleu_4": turn("one two three four five"),
}


def reference(name):
    return REFERENCES.get(name, turn("the red boat", "a calm sea"))


@pytest.mark.parametrize("name", METRICS)
def test_perfect_replies_score_one_and_nothing_scores_zero(name):
    asked = reference(name)
    right = perfect(name, asked.answers)
    assert METRICS[name](asked, right) == pytest.approx(1)
    for nothing in ("", " ", "\n", "...", "`#//", "{"):
        assert METRICS[name](asked, nothing) == 0


@given(reply=st.text(max_size=60), name=st.sampled_from(sorted(METRICS)))
def test_every_reply_has_a_score(reply, name):
    for text in (reply, f"Answer is: {reply} B 12 \\boxed{{{reply}}}", f"{{{reply}}}"):
        assert 0 <= METRICS[name](reference(name), text) <= 1


R = "The committee met on Monday. It approved the new budget of $3.5 million."
P = (
    "On Monday the committee met and it approved a budget. The new budget was of $3.5 "
    "million dollars."
)


@pytest.mark.parametrize(
    ("name", "reply", "asked", "score"),
    [
        # Computed with `rouge` 1.0.1, `nltk` and kvpress' scorers.
        ("rouge_l", P, turn(R), 0.6249999950781252),
        ("rouge_1_recall", P, turn(R), 0.8571428571428571),
        ("rouge_2_recall", P, turn(R), 0.38461538461538464),
        ("rouge_l_recall", P, turn(R), 0.7142857142857143),
        ("bleu_1", P, turn(R), 0.5),
        ("bleu_4", P, turn(R), 0),
        ("qa_f1", P, turn(R), 0.846153846153846),
        ("qa_f1_zh", "答案是:北京大学。", turn("北京大学", "清华"), 0.7272727272727273),
        (
            "code_similarity",
            "\n# first\n    return a + b * c\n",
            turn("    return a + c"),
            0.89,
        ),
        # By hand.
        ("string_match_all", "1a\n2b and 3C", turn("2B", "3c", "4"), 2 / 3),
        ("string_match_all", "one\ttwo", turn("onetwo"), 1),
        ("string_match_part", "no, 4!", turn("2B", "4"), 1),
        ("qa_f1", "The red boat, a red fox.", turn("red red boat"), 6 / 7),
        ("line_qa_f1", "\nboat\nred", turn("red boat"), 2 / 3),
        ("line_rouge_l", "red boat\nsea sea", turn("red boat"), 2 / (2 + 1e-8)),
        ("count", "3 of 12, so 3", turn("3"), 2 / 3),
        ("retrieval", "Paragraph 1 or 12", turn("Paragraph 12"), 0.5),
        ("bleu_1", "red boat", turn("red boat sea fox"), math.exp(1 - 4 / 2)),
        ("bleu_4", "a b c d x", turn("a b c d y"), math.exp(0) / 2),
        ("correct_answer_letter", "**The correct answer is (C)**", turn("C"), 1),
        ("correct_answer_letter", "The correct answer is C.", turn("C"), 1),
        ("correct_answer_letter", "The correct answer is Cats", turn("C"), 0),
        ("correct_answer_letter", "the answer is (C)", turn("C"), 0),
        ("word", '"ab-1": {"x"}', turn("ab-1"), 1),
        ("word", "ab-12", turn("ab-1"), 0),
        ("first_digits", "It is 0714, not 714", turn("714"), 0),
        ("last_integer", "It returns: -3.", turn("-3"), 1),
        ("last_integer", "-3 it is", turn("-3"), 0),
        ("first_number", "about -5 or 5", turn("5"), 0),
        ("first_number", "4.50!", turn("4.5"), 1),
        ("running_values", "[3, -2, 11]", turn("3", "-2", "10"), 2 / 3),
        ("contained", "it was ace", turn("ACE ROTHSTEIN", "ACE"), 1),
        ("choice", "The answer is: B. Maybe", turn("B"), 1),
        ("choice", "Because it rains", turn("B"), 0),
        ("choice", "(A) or (B)", turn("B"), 1),
        ("code_choice", "fetch_all fails", turn("J", "fetch_all"), 1),
        ("code_choice", "The bug is: fetch_all", turn("J", "fetch_all"), 1),
        ("cloze_exact", "{'<mask-0>': 'Bob', 'x': 1}", turn("{'<mask-0>': 'B'}"), 0),
        ("cloze_partial", "{'<mask-0>': 'Bob'}", turn("{'<mask-0>': 'Bob D'}"), 1),
        (
            "classification",
            "Other number maybe",
            turn("number", all_classes=CLASSES),
            0.5,
        ),
        ("classification", "It is\nDate", turn("Date", all_classes=CLASSES), 0),
        ("boxed", r"so \boxed{1}, no: \boxed{\dfrac{1}{2}}.", turn(r"\frac12"), 1),
        ("boxed", r"\boxed{070}", turn("70"), 1),
        ("boxed", r"\boxed{1,\!000}", turn("1000"), 1),
        ("boxed", r"\boxed{\left( 3, 4 \right)}", turn("(3,4)"), 1),
        ("boxed", r"\boxed{70", turn("70"), 0),
        ("kvpress_aime25", r"\boxed{1} \boxed{70}", turn("70"), 1),
        ("kvpress_math500", r"\boxed{70} \boxed{1}", turn("70"), 1),
        ("kvpress_math500", r"\boxed{\frac{1}{2}}", turn(r"\frac{1}{2}"), 0),
    ],
)
def test_scores(name, reply, asked, score):
    assert METRICS[name](asked, reply) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("classification", turn("Date"), "all_classes"),
        ("classification", turn("Date", all_classes="Date"), "all_classes"),
        ("retrieval", turn("12"), "Paragraph 12"),
        ("first_number", turn("four"), "four"),
        ("running_values", turn("3", "x"), "'x'"),
        ("cloze_exact", turn("Bob"), "mask-0"),
    ],
)
def test_what_a_metric_lacks_is_told_whatever_the_reply(name, asked, said):
    with pytest.raises(ValueError, match=said):
        METRICS[name](asked, "")


def test_nothing_of_a_reply_is_run():
    asked = turn("{'<mask-0>': 'Bob'}")
    assert METRICS["cloze_exact"](asked, "{'<mask-0>': print('Bob')}") == 0
    assert METRICS["cloze_exact"](asked, "{" * 30000) == 0


def test_long_texts_have_a_rouge():
    text = " ".join(f"w{i % 97}" for i in range(1500))
    assert rouge_l(text, text).recall == 1


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("simonjegou/ruler", "ruler"),
        ("Xnhyacinth/LongBench", "longbench"),
        ("simonjegou/LongBench-v2", "longbench_v2"),
        ("MaxJeblick/InfiniteBench", "infinitebench"),
        ("simonjegou/loogle", "loogle"),
        ("alessiodevoto/aime25", "aime25"),
        ("alessiodevoto/math500", "math500"),
        ("data/ruler/4096/test.parquet", "ruler"),
        ("own/data.jsonl", None),
    ],
)
def test_names_of_benchmarks(path, family):
    assert family_of(path) == family


def test_metrics_are_chosen_by_benchmark_and_task():
    named = metric_names("auto", "simonjegou/ruler", ["qa_1", "niah_single_1", "qa_1"])
    assert named == {"qa_1": "string_match_part", "niah_single_1": "string_match_all"}
    assert metric_names("auto", "own.jsonl", ["hotpotqa_e"]) == {"hotpotqa_e": "qa_f1"}
    assert metric_names("loogle", "own.jsonl", ["shortdep_cloze"]) == {
        "shortdep_cloze": "cloze_exact"
    }
    assert metric_names("count", "own.jsonl", ["x"]) == {"x": "count"}
    assert metric_names("auto", "alessiodevoto/math500", [""]) == {"": "boxed"}
    for name, choose in FAMILIES.items():
        assert choose("no task of any") in (None, *METRICS), name


@pytest.mark.parametrize(
    ("metric", "path", "tasks", "said"),
    [
        ("qa_f2", "own.jsonl", [], "qa_f1.*Did you mean 'qa_f1'"),
        ("auto", "own.jsonl", ["mine"], "mine.*Give `metric`.*ruler.*qa_f1"),
        ("auto", "own.jsonl", [""], "Give `metric`"),
        ("auto", "simonjegou/ruler", ["qa_1", "mine"], "'ruler'.*mine"),
        ("auto", "simonjegou/zero_scrolls", [], "no public answers"),
        ("longbench", "x", ["dureader"], "segmenter.*qa_f1_zh"),
        ("auto", "x", ["longbook_sum_eng"], "rouge_l"),
    ],
)
def test_metrics_that_cannot_be_chosen(metric, path, tasks, said):
    with pytest.raises(ValueError, match=said):
        metric_names(metric, path, tasks)
