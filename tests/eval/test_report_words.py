"""The report's texts: tokens as cells, two methods, time, divergence, worth."""

import html
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest

import kvjax
from kvjax.eval.report import (
    difference_map,
    kl_figure,
    kl_map,
    token_map,
    token_worth,
    write_report,
)
from kvjax.eval.report.chosen import (
    chosen_maps,
    chosen_pairs,
    in_full,
    told_maps,
    watched_maps,
    weighed_maps,
)
from kvjax.eval.report.flow import flow, shade, strip
from kvjax.eval.report.kept import (
    Cell,
    by_cell,
    cells_of,
    held,
    level,
    question_pieces,
    visible,
)
from kvjax.eval.report.pairs import overlap
from kvjax.eval.report.run import load_run
from kvjax.eval.report.strips import LEVELS, shade_of
from kvjax.eval.report.token_page import token_section
from kvjax.eval.report.words import drawable, layer_bands, lines_of, words_figure
from tests.eval import tiny
from tests.eval.synthetic import full_map, make_run

EVIL = '</script><b onclick="x">&'
WORDS = ["The", " 你", "", " river", "\n\n", EVIL, " runs", ".", " Old", " trees"]


def make(path: pathlib.Path, names, words=WORDS, **changes) -> pathlib.Path:
    """A run whose maps are of words, and hold all that maps can hold."""
    run = make_run(path, ["none", *names], keeps=(0.25,), needle=False)
    for file in (run / "maps").iterdir():
        file.unlink()
    for number, name in enumerate(names):
        entry = full_map(name, words, number) | changes
        (run / "maps" / f"{number}.json").write_text(json.dumps(entry))
    header = json.loads((run / "run.json").read_text())
    header["config"]["compressions"] = names
    (run / "run.json").write_text(json.dumps(header))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    names = ["snapkv", "h2o", EVIL]
    return make(tmp_path_factory.mktemp("run") / "run", names)


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text()


def test_cells_take_up_tokens_without_text():
    cells = cells_of(["a", "你", "", "", " b"])
    assert cells == [Cell("a", 0, 1), Cell("你", 1, 4), Cell(" b", 4, 5)]
    assert [cell.place for cell in cells] == ["0", "1-3", "4"]
    values = np.array([[1.0, 0, 1, 0.5, 2], [0, 0, 0, 3, 0]])
    np.testing.assert_allclose(by_cell(values, cells), [[1, 0.5, 2], [0, 1, 0]])
    assert cells_of([]) == [] and cells_of(["", "b"])[0] == Cell("", 0, 1)


def test_only_none_and_all_have_their_shades():
    assert [level(share) for share in (0, 0.001, 0.5, 0.999, 1)] == [0, 1, 4, 7, 8]
    assert shade(0.0) == "s0 none" and shade(1.0) == "s8 all" and shade(0.5) == "s4"
    kls = [0, 0.003, 0.2, 1e9, math.inf, math.nan]
    assert [shade_of(kl) for kl in kls] == [0, 1, 4, len(LEVELS), len(LEVELS), 0]


def test_questions_end_within_a_token():
    entry = {"text": "a b? c", "tokens": ["a", " b", "? ", "c"], "question": "? c"}
    assert question_pieces({**entry, "kept": [[[0]]]}) == 2
    assert question_pieces({**entry, "kept": [[[0]]], "question": "b? c"}) == 3
    assert question_pieces({**entry, "kept": [[[0]]], "question": "x"}) == 0


def test_white_space_and_control_characters_are_seen():
    assert visible("a\n\tb\x07\x00") == "a↵⇥b␇␀"
    text = flow(cells_of(["a\n\n", "<i>"]), ["s1", "s2"], ['"', "&"], "kept", 1)
    assert text == (
        '<div class="flow kept"><i class="s1" title="&quot;">a↵↵</i><br>'
        '<i class="s2 later" title="&amp;">&lt;i&gt;</i></div>'
    )


def test_figures_place_tokens_by_their_text():
    words = ["one", " two", " three", "x" * 20, ""]
    lines = lines_of(cells_of(words), 9)
    assert [[(a, b) for a, b, _ in line] for line in lines] == [
        [(0, 3), (3, 7)],
        [(0, 6)],
        [(0, 9)],
    ]
    assert lines[2][0][2].text == "x" * 8 + "…"
    assert drawable("aé你e\u0301🙂") == "aé□e□□"
    bands, labels = layer_bands(np.arange(60.0).reshape(30, 2))
    assert bands.shape == (8, 2) and labels[0] == "layers 0-3"
    assert labels[-1] == "27-29" and bands[0].tolist() == [3, 4]
    assert layer_bands(np.ones((2, 3)))[1] == ["layer 0", "1"]
    figure = words_figure(words, np.array([[0, 0.5, math.nan, 1, 1]]), title="$x")
    assert figure._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="at most 4096 tokens; got 5000"):
        words_figure(["a"] * 5000, np.ones((1, 5000)))
    assert words_figure([], np.ones((1, 0)), scale=("low", "high"))._repr_png_()


def test_overlap_by_hand():
    one = held([[[0, 1, 2], [0]], [[], [3]]], 4)
    other = held([[[1, 2, 3], [0]], [[], []]], 4)
    found = overlap(one, other)
    assert found.both.tolist() == [3, 0] and found.first.tolist() == [1, 1]
    assert found.second.tolist() == [1, 0] and found.neither.tolist() == [3, 7]
    np.testing.assert_allclose(found.jaccard, [0.6, 0])
    assert found.all.jaccard == pytest.approx(0.5)
    assert overlap(held([[[]]], 4), held([[[]]], 4)).jaccard.tolist() == [1.0]
    with pytest.raises(ValueError, match="one model and one text"):
        overlap(one, held([[[0]]], 4))
    entries = [full_map(name, WORDS, seed) for seed, name in enumerate("ab")]
    figure = difference_map(entries[0], entries[1], WORDS, names=("a", "$b"))
    assert figure._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="position 9"):
        token_map(entries[0], WORDS[:9])


def test_texts_are_whole_in_the_page(page):
    """What is shown of each section is the text, escaped, with numbers behind it."""
    flows = re.findall(r'<div class="flow (\w+)">(.*?)</div>', page)
    kinds = [kind for kind, _ in flows]
    assert kinds.count("kept") == 3 + 2 and kinds.count("pair") == 1
    assert kinds.count("life") == 3 and kinds.count("kl") == 3
    assert kinds.count("worth") == 1
    text = visible("".join(WORDS))
    for kind, body in flows:
        shown = html.unescape(re.sub(r"<[^>]+>", "", body))
        later = " and so on."
        whole = {"kl": later, "life": text + later}.get(kind, text)
        assert shown == whole
        titles = re.findall(r'title="([^"]*)"', body)
        assert len(titles) == body.count("<i ") and all(titles)
    assert EVIL not in page


def test_titles_tell_heads_and_times(page, run):
    entry = load_run(run).maps[0]
    heads = sum(3 in head for layer in entry["kept"] for head in layer)
    layers = sum(any(3 in head for head in layer) for layer in entry["kept"])
    assert (
        f"3 &#x27; river&#x27;: kept by {heads} of 16 heads, in {layers} of 4 layers"
    ) in page
    left = [head[3] for layer in entry["departures"]["left"] for head in layer]
    assert (
        f"dropped with the prompt by {left.count(0)}, after 2 to 3 more tokens by "
        f"{left.count(2) + left.count(3)}, held to the end by {left.count(None)} of 16"
    ) in page
    worth = sum(head[0] for layer in entry["worth"] for head in layer)
    assert f"0 &#x27;The&#x27;: worth {worth:+.3g} nats" in page
    kl = entry["following"]["kl"][0]
    assert f"1 &#x27; so&#x27;: KL {kl:.3g}, NLL" in page


def test_counts_of_the_two_methods(page, run):
    one, other, _ = load_run(run).maps
    found = overlap(*(held(entry["kept"], len(WORDS)) for entry in (one, other)))
    cells = [
        f"<td>{n}</td>"
        for n in (found.both[2], found.first[2], found.second[2], found.neither[2])
    ]
    line = f'<tr><th scope="row">2</th>{"".join(cells)}'
    assert f"{line}<td>{100 * found.jaccard[2]:.0f} %</td>" in page


def test_worth_that_was_kept(page, run):
    entry = load_run(run).maps[0]
    for one in load_run(run).maps[:2]:
        kept = np.concatenate(held(one["kept"], len(WORDS)))
        helps = np.maximum(np.concatenate(np.array(entry["worth"])), 0)
        share = 100 * (helps * kept).sum() / helps.sum()
        name = f"{one['compression']}, keep 0.25"
        assert f"{name}</th><td>20 %</td><td>{share:.0f} %</td>" in page


def test_what_is_compared(run, tmp_path):
    loaded = load_run(run)
    names = [entry["compression"] for entry in chosen_maps(loaded)]
    assert names == ["snapkv", "h2o", EVIL]  # as the run lists them

    def pair(*compare):
        ((one, other),) = chosen_pairs(loaded, compare or None)
        return one["compression"], other["compression"]

    assert pair() == ("snapkv", "h2o") and pair(EVIL, "h2o") == (EVIL, "h2o")
    assert len(watched_maps(loaded)) == len(told_maps(loaded)) == 3
    assert len(weighed_maps(loaded)) == 3
    for compare, says in (
        (["h2o"], "two different methods"),
        (["h2o", "h2o"], "two different methods"),
        (["h2o", "snapkv", EVIL], "two different methods"),
        (["snapvk", "h2o"], "no map of 'snapvk'.*Did you mean 'snapkv'"),
        (["none", "h2o"], "no map of 'none'"),
    ):
        with pytest.raises(ValueError, match=says):
            write_report(run, tmp_path / "out", compare=compare)
    assert not (tmp_path / "out").exists()
    other = make(tmp_path / "run", ["snapkv", "h2o"])
    entry = json.loads((other / "maps" / "1.json").read_text())
    (other / "maps" / "1.json").write_text(json.dumps(entry | {"keep": 0.5}))
    assert chosen_pairs(load_run(other)) == []
    with pytest.raises(ValueError, match="on one text at one budget"):
        chosen_pairs(load_run(other), ["snapkv", "h2o"])


def test_pages_of_long_texts_stay_small():
    """Further methods have their strips; single heads are a bit each."""
    words = [f" word{n}" for n in range(3500)]
    maps = [full_map(name, words, n) for n, name in enumerate("abcde")]
    assert in_full(len(words)) == 3 and in_full(300) == 40
    text = token_section(maps)
    assert text.count('<div class="flow kept">') == 3
    assert text.count("written out for the first methods only") == 2
    assert text.count('class="strip') == 5 and len(text) < 2e6
    many = [full_map("a", words, 0) | {"kept": 40 * full_map("a", words)["kept"]}]
    assert 'class="bits' in token_section(many)
    many[0]["kept"] = 4 * many[0]["kept"]  # 640 layers
    assert 'class="bits' not in token_section(many)


def test_texts_that_are_too_long_are_left_out(tmp_path):
    run = make(tmp_path / "run", ["snapkv", "h2o"], [" word"] * 5000)
    loaded = load_run(run)
    for chosen in (chosen_maps, watched_maps, weighed_maps):
        assert chosen(loaded) == []


def test_the_text_that_was_watched_longest(tmp_path):
    run = make(tmp_path / "run", ["snapkv", "h2o"])
    short = full_map("h2o", ["Another", " text"])
    left = [[[0, None]] * 4] * 4
    short["departures"] = {"tokens": [], "times": [0], "left": left}
    for number, name in enumerate(("snapkv", "h2o", "tova")):
        text = json.dumps(short | {"compression": name})
        (run / "maps" / f"short{number}.json").write_text(text)
    found = watched_maps(load_run(run))
    assert [len(entry["tokens"]) for entry in found] == [len(WORDS)] * 2


def test_strips_are_bounded():
    assert len(strip(np.random.default_rng(0).random(10**5), "much")) < 6000
    assert 'viewBox="0 0 1 24"' in strip(np.zeros(0), "nothing")
    assert "nan" not in strip(np.array([math.nan, 1.0]), "odd")


def test_divergence_in_figures():
    kl = {"snapkv": [0.1, 2.0, math.inf], "$h2o": [0.0, math.nan, 1e-9]}
    pieces = [" a", " b", " c"]
    assert kl_map(pieces, kl, title="$x")._repr_png_()[:4] == b"\x89PNG"
    assert kl_figure(kl)._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="fed, not predicted"):
        kl_map([*pieces, " d"], kl)


def test_worth_in_a_notebook():
    model, tokens = tiny.model(), jax.random.randint(jax.random.key(1), (30,), 4, 100)
    found = token_worth(model, tokens, 20, tiny.tokenizer())
    slopes = kvjax.gate_slopes(model, tokens[None], None, np.array([20]))
    np.testing.assert_array_equal(found.worth, -np.asarray(slopes)[:, 0, :, :20])
    np.testing.assert_allclose(found.per_token, found.worth.sum((0, 1)))
    text = found._repr_html_()
    assert text.count("nats per predicted token") == 20 and "<style>" in text
    assert found.figure(title="worth")._repr_png_()[:4] == b"\x89PNG"
    assert token_worth(model, tokens[None], 20).pieces[0] == f"{int(tokens[0])} "
    for rows, length, says in (
        (tokens.reshape(2, 15), 10, "one text"),
        (tokens, 30, "nothing follows"),
        (tokens, 0, "prompt_length"),
    ):
        with pytest.raises(ValueError, match=says):
            token_worth(model, rows, length)
