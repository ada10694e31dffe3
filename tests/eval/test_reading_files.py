"""Files of published data: every layout reads the same, every damage has its name."""

import gzip
import json
import re
import time

import pyarrow
import pyarrow.parquet
import pytest

from kvjax.eval.tasks.lists import listed
from kvjax.eval.tasks.reading_files import read_records

ROWS = [
    {"question": "a\u2028b?", "answer": ["x", "y"], "n": 3},
    {"question": "c, d\n?", "answer": ["z"], "n": 4},
]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        quoted = [
            ",".join(
                '"{}"'.format(str(value).replace('"', '""')) for value in row.values()
            )
            for row in rows
        ]
        path.write_text("\n".join([",".join(rows[0]), *quoted]))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


NAMES = ["test.jsonl", "test.jsonl.gz", "test.json", "test.parquet", "test.csv"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", [False, True])
def test_every_layout_reads_the_same(tmp_path, name, folder):
    place = tmp_path / "4096" if folder else tmp_path
    place.mkdir(exist_ok=True)
    file = write(place / name, ROWS)
    found = read_records(
        tmp_path if folder else file,
        ["answers|answer", "question"],
        optional=["level"],
        config="4096",
    )
    assert [one.texts("answers") for one in found] == [("x", "y"), ("z",)]
    assert [one.text("question") for one in found] == [r["question"] for r in ROWS]
    assert all(str(file) in one.place and "level" not in one.values for one in found)
    whole = read_records(file, ["n"])
    assert [one.whole("n") for one in whole] == [3, 4]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_column_and_an_empty_cell_are_named(tmp_path, name):
    file = write(tmp_path / name, ROWS)
    with pytest.raises(ValueError, match="no column `anwser`.*Did you mean 'answer'"):
        read_records(file, ["anwser"])
    empty = "" if name.endswith("csv") else None
    file = write(tmp_path / name, [ROWS[0], {**ROWS[1], "question": empty}])
    with pytest.raises(ValueError, match=rf"{name}, \w+ [23]: `question` is empty"):
        read_records(file, ["question"])


@pytest.mark.parametrize(
    "value",
    [[], "", "  ", ["a", " "], {"a": 1}, [None], True, [["a"]], float("nan")],
)
def test_an_answer_that_is_none_names_its_row(tmp_path, value):
    file = write(tmp_path / "a.jsonl", [{"answer": "x"}, {"answer": value}])
    found = read_records(file, ["answer"])
    assert found[0].texts("answer") == ("x",)
    with pytest.raises(ValueError, match="line 2: `answer` must be"):
        found[1].texts("answer")
    with pytest.raises(ValueError, match="line 2: `answer` must be"):
        found[1].whole("answer")


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 20, 10**30, 1e308, 2**31])
def test_numbers_that_nobody_means_name_their_row(tmp_path, value):
    file = write(tmp_path / "a.jsonl", [{"n": value}])
    with pytest.raises(ValueError, match="line 1: `n` must be a whole number"):
        read_records(file, ["n"])[0].whole("n")


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a' 'b']", ["a", "b"]),
        ("['a'\n \"it's\"]", ["a", "it's"]),
        (r"['it\'s', '\d']", ["it's", r"\d"]),
        ("[1, 2]", None),
        ("[0, 5)", None),
        ("[]", None),
        ("a ['b']", None),
        ("['a' 'b'", None),
    ],
)
def test_lists_that_are_printed(text, items):
    assert listed(text) == items


def test_numbers_are_texts_of_their_value(tmp_path):
    values = (70, 70.0, 0.5, [7, 8], 10**400)
    file = write(tmp_path / "a.jsonl", [{"answer": one} for one in values])
    found = [one.texts("answer") for one in read_records(file, ["answer"])]
    assert found == [("70",), ("70",), ("0.5",), ("7", "8"), ("1" + "0" * 400,)]


def test_a_list_without_an_end_takes_no_time():
    began = time.monotonic()
    assert listed("[" + "'a'    ,   " * 3000) is None
    assert time.monotonic() - began < 1


def damaged(tmp_path, name):
    file = write(tmp_path / name, ROWS)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    return file


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "b.csv"]
)
def test_damaged_files_are_named(tmp_path, name):
    file = damaged(tmp_path, name)
    if name.endswith("csv"):
        file.write_text("a,b\n1,2,3\n")
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_records(file, ["question"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"[1]\n", "line 1: expected an object"),
        ("a.jsonl", b'{"a": 1, "a": 2}', "twice"),
        ("a.jsonl", '{"a": "é"}'.encode("latin-1"), "not UTF-8"),
        ("a.json", b'{"a": 1}', "list of records"),
        ("a.txt", b"a", "ends in .parquet"),
        ("a.parquet.gz", b"a", "ends in .parquet"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv has two columns 'a'"),
        ("a.csv", b'b,a\n1,"2\n', "a.csv is not CSV; is it whole"),
    ],
)
def test_what_is_no_data_is_told(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_records(file, ["a"], field="train")


def broken_text():
    return pyarrow.Array.from_buffers(
        pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers()
    )


@pytest.mark.parametrize(
    "column",
    [
        broken_text(),
        pyarrow.array([2**31 - 1], pyarrow.date32()),
        pyarrow.array([2**62], pyarrow.duration("s")),
        pyarrow.array([1], pyarrow.timestamp("s", tz="Nowhere/Land")),
    ],
)
def test_values_that_python_has_not_are_named(tmp_path, column):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"], "b": column}), file)
    with pytest.raises(ValueError, match="a.parquet, rows 1 to 1: the column 'b'") as e:
        read_records(file, ["a"])
    assert type(e.value) is ValueError


def test_columns_that_stand_twice_are_refused(tmp_path):
    file = tmp_path / "a.parquet"
    columns = [pyarrow.array(["x"]), pyarrow.array(["y"])]
    table = pyarrow.Table.from_arrays(columns, names=["a", "a"])
    pyarrow.parquet.write_table(table, file)
    with pytest.raises(ValueError, match="a.parquet has two columns 'a'"):
        read_records(file, ["a"])
    file = tmp_path / "a.csv"
    file.write_text("a,,\nx,,\n")  # as spreadsheets leave them
    assert read_records(file, ["a"])[0].text("a") == "x"


def test_places_where_nothing_is(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        read_records(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match="`train` is empty"):
        read_records("", ["a"], field="train")
    write(tmp_path / "testing.jsonl", ROWS)
    with pytest.raises(ValueError, match="no file of the split 'test'.*testing.jsonl"):
        read_records(tmp_path, ["a"])


def test_shards_of_a_split_are_read_in_their_order(tmp_path):
    (tmp_path / "4096").mkdir()
    for number, row in enumerate(ROWS):
        write(tmp_path / "4096" / f"test-0000{number}-of-00002.parquet", [row])
    found = read_records(tmp_path, ["n"], config="4096")
    assert [one.whole("n") for one in found] == [3, 4]
    for config in ("", "8192"):
        with pytest.raises(ValueError, match=rf"{tmp_path.name} has \['4096'\]"):
            read_records(tmp_path, ["n"], config=config)
    write(tmp_path / "4096" / "test.jsonl", ROWS)
    with pytest.raises(ValueError, match="jsonl.*parquet.*Give the one"):
        read_records(tmp_path, ["n"], config="4096")


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(name, config, split):
        assert (name, config, split) == ("owner/name", "4096", "test")
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="'owner/name', configuration '4096'.*Without"):
        read_records("owner/name", ["a"], config="4096")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: ROWS)
    found = read_records("owner/name", ["n"])
    assert [one.whole("n") for one in found] == [3, 4]
    assert found[1].place == "data set 'owner/name', split 'test', row 2"
