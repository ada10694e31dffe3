"""Run directories with damaged files: the file is named, and the others stay."""

import json
import math
import pathlib
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvjax.eval.report import write_report
from kvjax.eval.report.maps import read_map
from kvjax.eval.report.run import load_run
from kvjax.eval.results import open_run
from kvjax.eval.rows import ROWS
from tests.eval.synthetic import full_map, make_run

DRAWS = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("run") / "run"
    return make_run(path, ["none", "random"], keeps=(0.5,), needle=False)


@pytest.fixture
def run(sound, tmp_path) -> pathlib.Path:
    return shutil.copytree(sound, tmp_path / "run")


def says(run: pathlib.Path, name: str, *words: str) -> None:
    others = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as said:
        load_run(run)
    for word in (name, *words):
        assert word in str(said.value)
    assert len(str(said.value)) < 900
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == others


@pytest.mark.parametrize(
    "change",
    [
        {"config": []},
        {"config": "demo"},
        {"config": {"tasks": 3}},
        {"config": {"tasks": [{"fields": {}}]}},
        {"config": {"tasks": [{"name": "recall", "label": 3}]}},
        {"model": 3},
        {"date": None},
        {"device": ["cpu"]},
        {"schema": True},
        {"schema": "1"},
        {"inputs": []},
        {"inputs": {"dataset": {"a": 1}}},
        {"inputs": {"dataset": {"a": ""}}},
        {"checkpoint": {"a": None}},
        {"model_fingerprint": 10**40},
    ],
    ids=str,
)
def test_other_types_in_the_header(run, change):
    path = run / "run.json"
    header = json.loads(path.read_text()) | change
    path.write_text(json.dumps(header))
    says(run, "run.json", next(iter(change)), "another directory")
    with pytest.raises(ValueError, match=r"run\.json"):
        open_run(run, {"schema": 3})


@pytest.mark.parametrize("text", ["", "[]", "3", '{"schema": 3', "\ud800"])
def test_a_header_that_is_no_object(run, text):
    (run / "run.json").write_bytes(text.encode(errors="surrogatepass"))
    says(run, "run.json")
    (run / "run.json").unlink()
    (run / "run.json").mkdir()
    says(run, "run.json", "a directory")


@pytest.mark.parametrize(
    "change",
    [
        {"kept": []},
        {"kept": [[]]},
        {"kept": {"0": [[1]]}},
        {"kept": [[["1"]]]},
        {"kept": [[[-1]]]},
        {"kept": [[[True]]]},
        {"kept": [[[1.5]]]},
        {"kept": [[[10**6]]]},
        {"text": None},
        {"task": ["recall"]},
        {"compression": 3},
        {"question": 3},
        {"keep": "half"},
        {"keep": 10**400},
        {"tokens": "abc"},
        {"tokens": ["a", 3]},
    ],
    ids=lambda change: str(change)[:30],
)
def test_other_types_in_a_map(run, change):
    path = next((run / "maps").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    says(run, path.name, next(iter(change)), "Delete it")


def changed(entry: dict, path: str, value) -> dict:
    """`entry` with another value at a dotted path."""
    held = entry
    *way, last = path.split(".")
    for name in way:
        held = held[int(name) if name.isdigit() else name]
    held[int(last) if last.isdigit() else last] = value
    return entry


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("following", []),
        ("following.tokens", []),
        ("following.tokens", [" and"]),
        ("following.kl", [0.1]),
        ("following.kl.0", "0.1"),
        ("following.nll.1", None),
        ("following.agrees.1", True),
        ("following.nll_full", None),
        ("following.kl.0", 10**400),
        ("departures", "never"),
        ("departures.tokens", [1]),
        ("departures.times", [0, 2, 3]),
        ("departures.times", [1, 2, 3, 4]),
        ("departures.times", [0, 3, 2, 4]),
        ("departures.times", [0, 2.0, 3, 4]),
        ("departures.left", [[]]),
        ("departures.left.0", []),
        ("departures.left.0.0", [0]),
        ("departures.left.0.0.0", 1),
        ("departures.left.0.0.0", -1),
        ("departures.left.0.0.0", True),
        ("departures.left.0.0.0", 0.0),
        ("worth", {}),
        ("worth.0", [[]]),
        ("worth.0.0.0", math.nan),
        ("worth.0.0.0", None),
        ("worth.1.0", [0.5]),
    ],
    ids=str,
)
def test_other_shapes_in_the_first_items_map(tmp_path, path, value):
    file = tmp_path / "0.json"
    entry = full_map("snapkv", list("abcdef"))
    file.write_text(json.dumps(entry))
    assert read_map(file) == entry
    file.write_text(json.dumps(changed(entry, path, value)))
    with pytest.raises(ValueError, match=rf"0\.json: '{path.split('.')[0]}' is not"):
        read_map(file)


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "[1, 2", ""])
def test_a_map_that_is_no_object(run, text):
    path = next((run / "maps").iterdir())
    path.write_text(text)
    says(run, path.name, "Delete it")


@pytest.mark.parametrize(
    "change",
    [
        {"task": None},
        {"compression": None},
        {"visibility": None},
        {"keep": 3.0},
        {"depth": float("nan")},
        {"resident_bytes": -1.0},
        {"resident_bytes": float("inf")},
        {"length": 0},
    ],
    ids=str,
)
def test_values_that_no_row_has(run, change):
    path = next((run / "rows").iterdir())
    row = pq.read_table(path).to_pylist()[0] | change
    pq.write_table(pa.Table.from_pylist([row], schema=ROWS), path)
    says(run, path.name, next(iter(change)), "Delete it")


def test_other_columns(run):
    path = next((run / "rows").iterdir())
    row = pq.read_table(path).to_pylist()[0]
    for table in (
        pa.Table.from_pylist([{"a": 1}]),
        pa.Table.from_pylist([row | {"score": "high"}]),
        pa.Table.from_pylist([row, row], schema=ROWS),
        pa.Table.from_pylist([], schema=ROWS),
        pa.Table.from_pylist([row], schema=ROWS).rename_columns(
            [name.upper() for name in ROWS.names]
        ),
    ):
        pq.write_table(table, path)
        says(run, path.name, "Delete it")
    path.unlink()
    path.mkdir()
    says(run, path.name, "Delete it")


def test_folders_that_are_missing(run):
    shutil.rmtree(run / "maps")
    assert not load_run(run).maps
    shutil.rmtree(run / "rows")
    says(run, str(run), "no finished cell", "Run the same evaluation")
    (run / "rows").write_text("a file")
    says(run, str(run), "no finished cell")


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Cut, with other bytes, or with a part that is there twice."""
    at, kind = draw.randrange(len(data)), draw.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + draw.randrange(1, 9) :]
    if kind == 2:
        return data[:at] + data[max(0, at - 20) :]
    return data[:at] + draw.randbytes(draw.randrange(1, 5)) + data[at + 1 :]


def damage(sound: pathlib.Path, path: pathlib.Path, seed: int) -> None:
    """One file of a run is damaged: the run loads, or the file is named."""
    draw = random.Random(seed)
    run = shutil.copytree(sound, path)
    folder = draw.choice(["rows", "maps", "."])
    file = draw.choice(sorted(p for p in (run / folder).iterdir() if p.is_file()))
    file.write_bytes(mutated(file.read_bytes(), draw))
    try:
        load_run(run)
    except ValueError as wrong:
        assert file.name in str(wrong) and len(str(wrong)) < 900
    shutil.rmtree(run)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage(sound, tmp_path, seed):
    for draw in range(DRAWS):
        damage(sound, tmp_path / "run", seed * DRAWS + draw)


@pytest.mark.slow
@pytest.mark.sweep(0, 0)
def test_much_random_damage(sound, tmp_path):
    for draw in range(3000):
        damage(sound, tmp_path / "run", 10**6 + draw)


def test_numbers_that_are_none_are_drawn(run):
    """A model that diverged has such rows."""
    odd = {"kl": float("inf"), "nll": float("nan"), "ms_per_token": float("nan")}
    for path in sorted((run / "rows").iterdir()):
        row = pq.read_table(path).to_pylist()[0]
        if row["task"] == "text":
            row |= odd
        pq.write_table(pa.Table.from_pylist([row], schema=ROWS), path)
    assert write_report(run).is_file()
