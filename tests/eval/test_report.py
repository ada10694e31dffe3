"""The report, from run directories that nobody ran."""

import html.parser
import json
import pathlib
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from kvjax.eval.report import token_map, write_report
from kvjax.eval.report.kept import heads_kept, pieces_of, question_pieces
from kvjax.eval.report.style import spread
from tests.eval.synthetic import make_run

EVIL = '<script>alert("x")</script>$&'
METHODS = ["none", "random", "snapkv", "kivi_4bit"]


class Document(html.parser.HTMLParser):
    """Checks that elements nest, and gathers what the tests ask about."""

    VOID = {"meta", "br", "img", "hr", "input", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> pathlib.Path:
    """A report with a method whose name is HTML."""
    path = tmp_path_factory.mktemp("run")
    return write_report(make_run(path / "run", [*METHODS, EVIL], keeps=(0.5, 0.1)))


def test_page_is_whole_and_asks_for_nothing(page):
    text = page.read_text()
    document = Document(text)
    assert not re.search(r"https?:|url\((?!#)|@import|src=|<link", text)
    assert {"svg", "table", "section"} <= set(document.tags)
    sections = {"score", "text", "time", "tokens", "pairs", "leaving", "worth"}
    assert sections | {"needle", "rows", "provenance"} <= set(document.ids)


def test_names_are_text(page):
    text = page.read_text()
    document = Document(text)
    assert "alert(" in text
    assert "<script>alert" not in text
    # Ours: the page's own, and one inert block of data per map, two of the pair.
    maps = len(list((page.parent.parent / "maps").iterdir()))
    assert document.tags.count("script") == 1 + maps + 2


def test_every_row_is_in_the_table(page):
    rows = len(list((page.parent.parent / "rows").iterdir()))
    table = re.search(r'class="sortable">.*?</table>', page.read_text(), re.DOTALL)
    assert table and table.group().count("<tr>") == rows + 1


def test_figures_lie_beside_the_page(page):
    names = {file.name for file in page.parent.glob("*.png")}
    assert {
        "score_recall_512.png",
        "time_1024.png",
        "needle_niah_snapkv.png",
    } <= names
    assert all(
        file.read_bytes()[:4] == b"\x89PNG" for file in page.parent.glob("*.png")
    )


def test_missing_pieces_say_so(tmp_path):
    run = make_run(tmp_path / "run", ["none"], needle=False)
    out = tmp_path / "elsewhere"
    text = write_report(run, out).read_text()
    assert text.count('class="empty"') == 5  # four that maps fill, and no needle
    assert (out / "score_recall_512.png").is_file()
    assert not (run / "report").exists()


def test_says_what_is_wrong_with_a_directory(tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no run\.json"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", ["none"], needle=False)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**about, "schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        write_report(run)
    (run / "run.json").write_text(json.dumps(about)[:40])
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        write_report(run)


def test_names_damaged_files(tmp_path):
    run = make_run(tmp_path / "run", ["none", "random"], needle=False)
    file = sorted((run / "rows").iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=file.name):
        write_report(run)
    file.unlink()
    (run / "maps" / "1.json").write_text('{"text": "abc"')
    with pytest.raises(ValueError, match=r"1\.json is not JSON.*Delete it"):
        write_report(run)
    for file in (run / "rows").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no finished cell"):
        write_report(run)


def test_token_map_counts_heads():
    kept = [[[0, 2], [2]], [[1], []]]
    np.testing.assert_array_equal(heads_kept(kept, 3), [[1, 0, 2], [0, 1, 0]])
    with pytest.raises(ValueError, match="position 2"):
        heads_kept(kept, 2)
    figure = token_map({"kept": kept, "text": "a$b"}, "a$b", title="three")
    assert isinstance(figure, Figure) and len(figure.axes) == 1
    assert figure._repr_png_()[:4] == b"\x89PNG"


def test_pieces_of_a_map():
    entry = {"text": "ab?", "kept": [[[0, 3]]], "question": "?"}
    assert pieces_of(entry) == ["◆", "a", "b", "?"]
    assert question_pieces(entry) == 1
    tokens = {**entry, "tokens": ["<bos>", "a", "b"]}
    assert pieces_of(tokens) == ["<bos>", "a", "b"]
    assert question_pieces(tokens) == 0


def test_labels_keep_their_distance():
    placed = spread([0.5, 0.5, 0.5, 0.1], 0.1, 0.0, 1.0)
    gaps = np.diff(sorted(placed))
    assert gaps.min() > 0.099 and 0 <= min(placed) and max(placed) <= 1
    crowded = spread([0.9] * 30, 0.1, 0.0, 1.0)
    assert max(crowded) <= 1 + 1e-9 and min(crowded) >= -1e-9
