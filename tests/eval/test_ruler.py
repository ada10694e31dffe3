"""RULER's tasks: what is asked is in the context, counted here by other means."""

import collections
import pathlib
import re

import pytest

from kvjax.eval.tasks import RULER, make_task
from kvjax.eval.tasks.essays import made_up, sentences
from kvjax.eval.tasks.ruler.needle import NOISE
from kvjax.eval.tasks.words import ADJECTIVES, NOUNS, pairs, single
from tests.eval.episodes import episode
from tests.eval.languages import essay

SHAPES = {
    "niah_single_1": ("noise", 1, 1, 1, "words", "numbers"),
    "niah_single_2": ("essay", 1, 1, 1, "words", "numbers"),
    "niah_single_3": ("essay", 1, 1, 1, "words", "uuids"),
    "niah_multikey_1": ("essay", 4, 1, 1, "words", "numbers"),
    "niah_multikey_2": ("needle", 1, 1, 1, "words", "numbers"),
    "niah_multikey_3": ("needle", 1, 1, 1, "uuids", "uuids"),
    "niah_multivalue": ("essay", 1, 4, 1, "words", "numbers"),
    "niah_multiquery": ("essay", 4, 1, 4, "words", "numbers"),
}
"""As synthetic.yaml of the public repository has them."""
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("essays") / "one.txt"
    path.write_text(essay(), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_needles_are_as_published(name, text):
    haystack, keys, values, queries, key_kind, value_kind = SHAPES[name]
    task, made = episode(name, 30, essays=str(text))
    needles = NEEDLE.findall(made.context)
    assert task.name == name and task.max_new_tokens == 128
    assert len(needles) == keys * values + (30 if haystack == "needle" else 0)
    kinds = {"numbers": r"[1-9]\d{6}", "uuids": UUID, "words": "[a-z]+-[a-z]+"}
    known = collections.defaultdict(list)
    for kind, key, value in needles:
        assert kind == value_kind
        assert re.fullmatch(kinds[key_kind], key)
        assert re.fullmatch(kinds[value_kind], value)
        known[key].append(value)
    assert len({value for _, _, value in needles}) == len(needles)
    (turn,) = made.turns
    asked = re.search(r" for (.+) mentioned", turn.question)
    assert asked
    names = re.split(", and |, ", asked[1])
    assert len(names) == queries
    assert sorted(turn.answers) == sorted(v for one in names for v in known[one])


def test_one_needle_is_asked_in_the_published_words():
    _, made = episode("niah_single_1", 3)
    begin, *lines, end = made.context.split("\n")
    assert begin == (
        "A special magic number is hidden within the following text. Make sure to "
        "memorize it. I will quiz you about the number afterwards."
    )
    assert collections.Counter(lines)[NOISE] == 3 and len(lines) == 4 and not end
    (turn,) = made.turns
    key, (value,) = turn.meta["key"], turn.answers
    what = f"special magic number for {key} mentioned in the provided text"
    assert turn.question == f"What is the {what}? "
    assert turn.prefix == f"The {what} is"
    assert turn.answer == f" {value}"


def test_several_needles_are_asked_in_the_published_words(text):
    _, made = episode("niah_multiquery", 40, essays=str(text))
    assert made.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to "
        "memorize it. I will quiz you about the numbers afterwards.\n"
    )
    (turn,) = made.turns
    keys = turn.meta["key"]
    assert re.fullmatch(r"([\w-]+, ){3}and [\w-]+", keys)
    what = f"special magic numbers for {keys} mentioned in the provided text"
    assert turn.question == f"What are all the {what}? "
    assert turn.prefix == f"The {what} are"
    assert turn.answer == " " + ", ".join(turn.answers)


def test_keys_that_one_question_asks_are_dealt_out_over_several(text):
    for turns, each in ((1, [4]), (2, [2, 2]), (4, [1, 1, 1, 1]), (9, [1, 1, 1, 1])):
        _, made = episode("niah_multiquery", 40, turns, essays=str(text))
        assert [len(one.answers) for one in made.turns] == each
    _, made = episode("niah_multikey_2", 20, 5)
    assert len({one.answers for one in made.turns}) == 5


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("haystack", ["noise", "essay", "needle"])
def test_the_asked_needle_stands_at_its_depth(depth, haystack, text):
    fields = {"depth": depth, "haystack": haystack, "keys": 3, "essays": str(text)}
    for seed in range(5):
        _, made = episode("niah_multikey_1", 60, seed=seed, **fields)
        body = made.context.split("\n", 1)[1]
        at = body.index(made.turns[0].answers[0]) / len(body)
        assert abs(at - depth) < 0.08


def test_names_draw_numbers_of_their_own():
    plain, other = (
        make_task(name, haystack="noise").generate(0, 1, 2000)[0]
        for name in ("niah_single_1", "niah_single_2")
    )
    assert plain.context != other.context


def test_essays_keep_their_words_between_needles(text):
    _, made = episode("niah_single_2", 50, essays=str(text))
    body = made.context.split("\n", 1)[1]
    rest = NEEDLE.sub("", body).split()
    whole = essay().split()
    assert 400 < len(rest) and " ".join(rest) in " ".join(whole * 2)


def test_without_essays_sentences_are_made_up_which_is_said(monkeypatch, caplog):
    monkeypatch.delenv("KVJAX_DATA", raising=False)
    made_up.cache_clear()
    with caplog.at_level("WARNING"):
        _, made = episode("niah_single_2", 50)
    assert "no essays are given" in caplog.text
    assert len(set(made_up())) > 4000
    assert sum(line in made.context for line in made_up()) == 50


def test_essays_may_be_a_folder_and_are_none_of_ours(tmp_path, monkeypatch, text):
    monkeypatch.delenv("KVJAX_DATA", raising=False)
    with pytest.raises(ValueError, match="no .txt file"):
        episode("niah_single_2", 5, essays=str(tmp_path))
    with pytest.raises(ValueError, match="no file or folder"):
        episode("niah_single_2", 5, essays=str(tmp_path / "none"))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no word"):
        episode("niah_single_2", 5, essays=str(tmp_path))
    folder = tmp_path / "lm" / "gutenberg"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("One. Two.")
    (folder / "b.txt").write_text("Three!\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sentences("~/lm/gutenberg/a.txt") == ("One.", "Two.")
    monkeypatch.setenv("KVJAX_DATA", str(tmp_path))
    assert sentences("") == ("One.", "Two.", "Three!")


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("“Is it?” he said. “Yes.” Then\nthey   left.", 3),
        ("Mr. Hill met Mrs. Oak. Both ran.", 2),
        ("*** START OF THE PROJECT ***\nA dog. *** END OF THE PROJECT *** No.", 1),
        ("word " * 150, 3),
        ("x" * 1000, 3),
        ("你好。再见。", 2),
    ],
)
def test_sentences_end_where_they_end(tmp_path, raw, want):
    (tmp_path / "t.txt").write_text(raw, encoding="utf-8")
    found = sentences(str(tmp_path / "t.txt"))
    assert len(found) == want
    if "***" not in raw:
        assert "".join("".join(found).split()) == "".join(raw.split())


def test_words_of_our_own_are_enough():
    assert len(set(pairs())) == len(ADJECTIVES) * len(NOUNS) > 20_000
    plain = {*ADJECTIVES, *NOUNS}
    assert not [(a, b) for a in plain for b in plain if a != b and a in b]
    assert not any("-" in word for word in single(380))
    few, many = single(380), single(5000)
    assert len(set(few)) == len(few) and len(set(many)) == len(many) > 5000
    assert all("-" in word for word in many)


def test_words_may_be_listed(tmp_path):
    (tmp_path / "few.txt").write_text("zig\nzag\n\nzig\n")
    _, made = episode("niah_multikey_2", 5, words=str(tmp_path / "few.txt"))
    keys = [key for _, key, _ in NEEDLE.findall(made.context)]
    assert len(set(keys)) == 6 and all(re.fullmatch("z[ia]g(-[234])?", k) for k in keys)
    (tmp_path / "few.txt").write_text("other\n")  # what changes is read again
    _, made = episode("niah_single_1", 5, words=str(tmp_path / "few.txt"))
    assert made.turns[0].meta["key"] == "other"
    (tmp_path / "adjectivelist.txt").write_text("big\nsmall\n")
    (tmp_path / "nounlist.txt").write_text("dog\n")
    _, made = episode("niah_single_1", 5, words=str(tmp_path))
    assert made.turns[0].meta["key"] in ("big-dog", "small-dog")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"none.txt holds no word"):
        episode("niah_single_1", 5, words=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(("chains", "hops", "turns"), [(1, 4, 1), (2, 2, 2), (1, 1, 3)])
@pytest.mark.parametrize("haystack", ["noise", "essay"])
def test_chains_of_assignments_end_in_their_names(chains, hops, turns, haystack, text):
    fields = {"chains": chains, "hops": hops, "haystack": haystack}
    _, made = episode("vt", 20, turns, essays=str(text), **fields)
    shot, body = re.split(r"(?<=\n\n)(?=Memorize and track)", made.context)
    assert len(made.turns) == turns
    for context, turn in ((body, one) for one in made.turns):
        assert context.endswith("\n") and context.startswith("Memorize and track the ")
        assert held(context, turn.meta["value"]) == list(turn.answers)
        assert turn.question == (
            f"Question: Find all variables that are assigned the value "
            f"{turn.meta['value']} in the text above. "
        )
        assert turn.prefix.endswith(
            f"{hops + 1} variables are assigned the value {turn.meta['value']}, they "
            "are: "
        )
    asked = re.search(r"assigned the value (\d+) in.*they are:  ([A-Z ]+)\n\n$", shot)
    assert asked and held(shot, asked[1]) == asked[2].split()


def held(text: str, value: str) -> list[str]:
    """Names that hold a number, by running the assignments in their order."""
    memory: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        memory[str(name)] = memory.get(source, str(source))
    return [name for name, found in memory.items() if found == value]


def test_fields_are_held_to_what_there_is():
    _, made = episode("niah_single_2", 9, haystack="noise", keys=2)
    assert len(NEEDLE.findall(made.context)) == 2
    assert set(SHAPES) <= set(RULER)
    with pytest.raises(ValueError, match=r"'essay'.*Did you mean 'essay'"):
        make_task("niah_single_1", haystack="essays")
    for wrong in (0, 10**9, 1.5, "two"):
        with pytest.raises(ValueError, match="`NiahSingle1.keys` must be an integer"):
            make_task("niah_single_1", keys=wrong)
    with pytest.raises(ValueError, match="Did you mean 'niah_multikey_1'"):
        make_task("niah_multkey_1")
