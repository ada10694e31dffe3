"""Files of training data: encodings, columns, and what cannot be read, by its row."""

import gzip
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvjax.train.data.files import read
from kvjax.train.data.sources import open_dataset, opened
from kvjax.train.data.tokenizer import decode
from kvjax.train.recipe import Source
from tests.train.datasets_samples import TEXTS, mixture, same, write_jsonl

pytestmark = pytest.mark.usefixtures("datasets_cache")

OPTIONS = {"kind": "json", "columns": ("t",), "encoding": "", "field": ""}
LINES = "".join(f'{{"t": "text {i} {c}"}}\n' for i, c in enumerate("aé日"))


def texts_of(path, **changes) -> list[str]:
    options = {**OPTIONS, "sample_by": "document", **changes}
    return [record[options["columns"][0]] for _, record in read(str(path), options)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_json_lines_of_any_encoding(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES, encoding=encoding)
    want = ["text 0 a", "text 1 é", "text 2 日"]
    if not encoding.startswith("utf-8"):
        with pytest.raises(ValueError, match=f"a.jsonl: .*`encoding: {encoding}`"):
            texts_of(path)
        assert texts_of(path, encoding=encoding) == want
    else:
        assert texts_of(path) == want


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-be", "utf-32"])
def test_the_mark_before_a_text_is_no_part_of_it(tmp_path, mark, encoding):
    path = tmp_path / "a.txt"
    path.write_text(mark + "a text\nof two lines", encoding=encoding)
    given = {"kind": "text", "columns": ("text",), "encoding": encoding}
    assert texts_of(path, **given) == ["a text\nof two lines"]
    lines = texts_of(path, **given, sample_by="line")
    assert lines == ["a text", "of two lines"]


@pytest.mark.parametrize("by", ["line", "document", "paragraph"])
def test_bytes_of_another_encoding_are_told_by_their_line(tmp_path, by):
    path = tmp_path / "old.txt"
    path.write_bytes("one\ntwo\ncafé au lait\n".encode("latin-1"))
    given = {"kind": "text", "columns": ("text",), "sample_by": by}
    with pytest.raises(ValueError, match="old.txt: line 3: byte 0xe9.*`encoding`"):
        texts_of(path, **given)
    assert "café" in "".join(texts_of(path, **given, encoding="latin-1"))


def test_text_by_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n\n\nthree\n\nfour")
    given = {"kind": "text", "columns": ("text",), "sample_by": "paragraph"}
    assert texts_of(path, **given) == ["one\ntwo", "three", "four"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"t": "a"}\n\n{"t": "b"\n', "line 3: column .*: no JSON"),
        ('{"t": "a"}\n["b"]\n', "line 2: expected an object; got "),
        ('{"t": "a"}\n3\n', "line 2: expected an object; got 3"),
        ('[{"t": "a"}, 3]', "record 2: expected an object; got 3"),
        ('[{"t": "a"},\n{"t": b}]', "line 2, column 7: no JSON"),
        ("[" * 99999, "JSON that is nested too deeply"),
        ('{"t": ' + "[" * 99999, "line 1: JSON that is nested too deeply"),
        ('{"t": ' + "9" * 9999 + "}", "line 1: no JSON"),
        ('{"text": "a"}\n', r"no column 't'; it has \['text'\]"),
    ],
)
def test_broken_json_is_told_by_its_row(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"a.jsonl: {message}"):
        texts_of(tmp_path / "a.jsonl")


def test_json_of_several_lines(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"t": "a"}, {"t": "b"}]
    for content, field in ((rows, ""), ({"data": rows}, "data")):
        path.write_text(json.dumps(content, indent=2))
        assert texts_of(path, field=field) == ["a", "b"]
    with pytest.raises(ValueError, match=r"a.json: no column 't'; it has \['data'\]"):
        texts_of(path)
    with pytest.raises(ValueError, match="a.json: no field 'rows'"):
        texts_of(path, field="rows")
    path.write_text(json.dumps(rows[0], indent=2))
    assert texts_of(path) == ["a"]


def test_packed_files(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(LINES.encode())
    path.write_bytes(whole)
    assert len(texts_of(path)) == 3
    for broken in (whole[:-12], b"\x1f\x8b" + whole[20:], LINES.encode()):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="a.jsonl.gz: "):
            texts_of(path)
    path.write_bytes(b"")
    assert texts_of(path) == []


def test_parquet_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"t": [f"text {i}" * 9 for i in range(999)]}), path)
    whole = path.read_bytes()
    middle = len(whole) // 3
    for broken in (b"", whole[:-9], whole[:middle] + b"\xff" * 9 + whole[middle + 9 :]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a.parquet: \S"):
            texts_of(path, kind="parquet")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a.parquet: no column 'tx'; it has \['t'\]"):
        texts_of(path, kind="parquet", columns=("tx",))


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_may_differ_among_files(tmp_path, streaming):
    rows = [
        {"text": text, "id": i if i % 3 else str(i)} for i, text in enumerate(TEXTS)
    ]
    for row in rows[7:]:
        row["id"], row["score"] = [row["id"]], 0.5
    for name, part in (("a", rows[:5]), ("b", rows[5:9]), ("c", rows[9:])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    source = Source(dataset=str(tmp_path), text="text", streaming=streaming)
    found = open_dataset(source, "train")
    read: list[Any] = [opened(dict(record), None) for record in found]
    assert [record for record, _ in read] == [{"text": text} for text in TEXTS]
    assert read[6][1] == f"{tmp_path}/b.jsonl, line 2"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": 3}', "b.jsonl, line 2: column 'text' must hold text; got int: '3'"),
        ('{"text": ["a"]}', "b.jsonl, line 2: column 'text' must hold text; got list"),
        ("{", "b.jsonl: line 2: column .*: no JSON"),
    ],
)
def test_a_bad_row_names_dataset_file_and_row(tmp_path, streaming, bad, message):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "b.jsonl").write_text('{"text": "ok"}\n' + bad + "\n")
    source = Source(dataset=str(tmp_path / "*.jsonl"), text="text", streaming=streaming)
    with pytest.raises(ValueError, match=f"dataset '.*', split 'train'.*{message}"):
        list(mixture(source).batches(0, 9))


def test_slices_and_splits_of_files(tmp_path):
    for name, part in (("a", TEXTS[:8]), ("b", TEXTS[8:])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in part])
    both = Source(dataset=str(tmp_path), text="text")

    def texts(source: Source, split: str) -> list[str]:
        found = open_dataset(source, split)
        return [opened(dict(record), None)[0]["text"] for record in found]

    assert texts(both, "train[:25%]+train[-2:]") == TEXTS[:3] + TEXTS[-2:]
    files = {"train": str(tmp_path / "a*"), "held": [str(tmp_path / "b.jsonl")]}
    fields = {"data_files": files}
    apart = Source(dataset=str(tmp_path), text="text", fields=fields)
    assert texts(apart, "held") == TEXTS[8:] and texts(apart, "train") == TEXTS[:8]
    with pytest.raises(ValueError, match=r"no split 'test'; there is \['held', 'tr"):
        texts(apart, "test")
    with pytest.raises(ValueError, match="split 'train.:x.'"):
        texts(apart, "train[:x]")
    stream = Source(dataset=str(tmp_path), text="text", fields=fields, streaming=True)
    assert texts(stream, "held") == TEXTS[8:]
    with pytest.raises(ValueError, match="a stream has no slices"):
        texts(stream, "train[:3]")


def test_a_file_that_changed_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    for text in ("one", "another"):
        write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
        batch = mixture(Source(dataset=path, text="text")).batch(0)
        assert decode(batch.tokens[0]).startswith(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_by": "line"}, r"'sample_by'; of json files it may have \['data_fil"),
        ({"features": 1}, "`fields` has 'features'"),
        ({"data_files": "gone/*.jsonl"}, "nothing matches 'gone/.*.jsonl'"),
        ({"data_files": "gone.jsonl"}, r"no such file \('gone.jsonl'\)"),
    ],
)
def test_fields_that_files_do_not_have(texts, fields, message):
    with pytest.raises(ValueError, match=f"texts.jsonl': .*{message}"):
        mixture(Source(dataset=texts, text="text", fields=fields))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_without_a_record(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text("")
    source = Source(dataset=str(tmp_path), text="text", streaming=streaming)
    with pytest.raises(ValueError, match="no record that can be used, of 0"):
        mixture(source).batch(0)
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in TEXTS])
    alone = Source(dataset=str(tmp_path / "b.jsonl"), text="text", streaming=streaming)
    if not streaming:  # another number of files is mixed in another way
        same(mixture(source).batch(0), mixture(alone).batch(0))


def test_encodings_that_there_are_not():
    for encoding in ("utf-99", "base64", "a\0b"):
        with pytest.raises(ValueError, match="`encoding` must be one that Python"):
            Source(dataset="a.txt", text="text", encoding=encoding)
