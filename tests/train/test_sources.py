"""Datasets that lack what training needs: named, counted, refused."""

import dataclasses
import errno
import json
import logging
import os
from typing import Any

import numpy as np
import pytest

from kvjax.train.data import sources
from kvjax.train.data.tokenizer import EOS, decode
from kvjax.train.recipe import DataConfig, Source, Stage
from kvjax.train.run.inputs import inputs_of
from tests.train.datasets_samples import STAGES, TEXTS, mixture, same, write_jsonl
from tests.train.tiny_run import recipe

pytestmark = pytest.mark.usefixtures("datasets_cache")


def longer(count: int) -> list[dict]:
    return [{"q": "long " * 20 + str(i), "a": "x"} for i in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_left_out_is_counted(tmp_path, streaming, caplog):
    records = [{"q": "q", "a": "a"}, {"q": "q", "a": ""}, {"q": None, "a": "a"}]
    path = write_jsonl(tmp_path / "mixed.jsonl", records + longer(2))
    source = Source(dataset=path, prompt="q", answer="a", streaming=streaming)
    stages = (Stage(steps=9, lengths={64: 1.0}, tokens_per_step=640),)
    with caplog.at_level(logging.WARNING, logger="kvjax.train"):
        one = mixture(source, stages=stages)
        batch = one.batch(0)
    assert {decode(tokens) for tokens in batch.tokens} == {"qa"}
    want = {"without an answer": 1, "empty": 1, "longer than a row of 64 tokens": 2}
    assert one.readers[0][1].skipped == want
    assert "left out:" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_documents_are_left_out(tmp_path, streaming):
    records = [{"t": text} for text in ("", "one", None, " \n", "two")]
    path = write_jsonl(tmp_path / "gaps.jsonl", records)
    one = mixture(Source(dataset=path, text="t", streaming=streaming))
    flow = np.asarray(one.batch(0).tokens).ravel()
    pieces = np.split(flow, np.flatnonzero(flow == EOS) + 1)[:-1]
    assert {decode(piece) for piece in pieces} == {"one", "two"}
    assert one.readers[0][1].skipped == {"empty": 3}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"q": "q", "a": ""}] * 3, "no record that can be used, of 3.*3 without an"),
        (longer(3), "3 longer than a row of 64|no record fits a row of"),
    ],
)
def test_a_dataset_without_a_usable_record(tmp_path, records, message, streaming):
    path = write_jsonl(tmp_path / "useless.jsonl", records)
    source = Source(dataset=path, prompt="q", answer="a", streaming=streaming)
    with pytest.raises(ValueError, match=message):
        mixture(source).batch(0)


def test_records_that_fit_only_some_rows(tmp_path, caplog):
    records = [{"q": "q" * n, "a": "a"} for n in (10, 50, 55)]
    path = write_jsonl(tmp_path / "some.jsonl", records)
    source = Source(dataset=path, prompt="q", answer="a")
    batches = list(mixture(source).batches(0, 9))
    for batch in batches:
        lengths = (np.asarray(batch.weights).cumsum(1) == 0).sum(1)
        assert (lengths == 11).all() or batch.tokens.shape[1] == 64
    assert "2 of 3 records are longer than 48 tokens" in caplog.text
    path = write_jsonl(tmp_path / "wide.jsonl", records[1:])
    with pytest.raises(ValueError, match="shortest record has 53 tokens"):
        mixture(Source(dataset=path, prompt="q", answer="a"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_names_the_nearest(texts, streaming):
    source = Source(dataset=texts, text="txt", streaming=streaming)
    with pytest.raises(ValueError, match=r"no column 'txt'; it has \['text'\].*'text'"):
        mixture(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "gone.jsonl': no such file"),
        ("*.parquet", r"\*.parquet': no such file"),
        ("notes.md", r"end in \['.md'\]; expected one kind"),
        (".", r"end in \['.jsonl', '.txt'\]; expected one kind"),
        ("broken.jsonl", "broken.jsonl', split 'train': "),
    ],
)
def test_files_that_are_not_there_or_not_readable(tmp_path, texts, name, message):
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text("{broken")
    with pytest.raises(ValueError, match=message):
        mixture(Source(dataset=str(tmp_path / name), text="text"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("texts", {"data_files": 3}, "`data_files` must be .*got 3"),
        ("texts", {"data_files": [None]}, "`data_files` must be"),
        ("texts", {"data_files": {"train": None}}, "`data_files` must be"),
        ("owner/name", {"data_files": {1: "x"}}, "`data_files` must be"),
        ("texts", {"field": [None]}, "`field` must be a key"),
        ("x" * 5000, {}, "Dataset|hub|name"),
        ("*" * 300 + "/" + "x" * 300, {}, "no such file"),
    ],
)
def test_names_that_lead_to_no_file(texts, name, fields, message):
    source = Source(dataset=texts if name == "texts" else name, text="t", fields=fields)
    with pytest.raises(ValueError, match=message) as said:
        sources.open_dataset(source, "train")
    assert f"dataset '{source.dataset[:9]}" in str(said.value)
    assert len(str(said.value)) < 1500


def test_a_disk_that_refuses_a_name(monkeypatch):
    def refuses(*_, **__):
        raise OSError(errno.ENAMETOOLONG, "File name too long")

    monkeypatch.setattr("glob.glob", refuses)
    source = Source(dataset="a*", text="t")
    with pytest.raises(ValueError, match=r"dataset 'a\*': .*too long"):
        sources.open_dataset(source, "train")
    with pytest.raises(ValueError, match=r"dataset 'a\*': .*too long"):
        inputs_of(recipe(data=DataConfig(sources=(source,))), {})


def test_parquet_folders_and_patterns(tmp_path):
    import datasets

    (tmp_path / "folder").mkdir()
    for i in range(2):
        part = datasets.Dataset.from_dict({"text": TEXTS[6 * i : 6 * i + 6]})
        part.to_parquet(tmp_path / "folder" / f"part{i}.parquet")
    one, two = (
        mixture(Source(dataset=str(tmp_path / name), text="text")).batch(0)
        for name in ("folder", "folder/*.parquet")
    )
    same(one, two)


def test_a_hub_id_goes_to_the_library(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, /, **options):
        asked.update(options, path=path)
        return datasets.Dataset.from_dict({"body": TEXTS, "other": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(
        dataset="owner/name", text="body", split="train[:9]", fields={"name": "en"}
    )
    records = sources.open_dataset(source, source.split)
    assert records.column_names == ["body"]
    want = {"name": "en", "split": "train[:9]", "streaming": False}
    assert asked == {"path": "owner/name", **want}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_hub_are_told_by_their_number(monkeypatch, streaming):
    import datasets

    table = datasets.Dataset.from_dict({"body": [*TEXTS[:5], None, ""]})
    found: Any = table.to_iterable_dataset() if streaming else table
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    one = mixture(Source(dataset="owner/name", text="body", streaming=streaming))
    list(one.batches(0, 4))
    reader = one.readers[0][1]
    assert reader.skipped == {"empty": 2}
    assert reader.left_out.first["empty"] in ("row 6", "row 7")
    with pytest.raises(ValueError, match=r"owner/name'.*no column 't'; it has \['body"):
        mixture(Source(dataset="owner/name", text="t", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_fails_says_why(monkeypatch, streaming):
    import datasets

    def rows():
        yield {"body": "a text"}
        raise OSError("connection lost")

    def load_dataset(*_, streaming: bool, **__):
        if streaming:
            return datasets.IterableDataset.from_generator(rows)
        return datasets.Dataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(dataset="owner/name", text="body", streaming=streaming)
    with pytest.raises(ValueError, match="'owner/name', split 'train': OSError: conn"):
        mixture(source).batch(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either `task` or `dataset`; got neither"),
        ({"task": "fact", "dataset": "x/y"}, "got both"),
        ({"task": "fact", "text": "t"}, "`text` is of a dataset.*'fact'"),
        ({"dataset": "x/y"}, "columns of one kind of record.*got none"),
        ({"dataset": "x/y", "text": "t", "messages": "m"}, "got {'text': 't', 'mess"),
        ({"dataset": "x/y", "prompt": "p"}, "`prompt` and `answer`.*'prompt': 'p'"),
        ({"task": "fact", "fields": {"x": float("nan")}}, "`fields` .*finite numbers"),
        (
            {"dataset": "x/y", "text": "t", "buffer": 0},
            "buffer` must be an integer",
        ),
    ],
)
def test_sources_that_contradict_themselves(given, message):
    with pytest.raises(ValueError, match=message):
        Source(**given)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_other_text_of_the_same_size_and_time_is_read_anew(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    fields = {"sample_by": "line"} if suffix == ".txt" else {}
    source = Source(dataset=str(path), text="text", fields=fields)
    for word in ("first", "other"):
        lines = [json.dumps({"text": word}) if suffix == ".jsonl" else word] * 40
        path.write_text("\n".join(lines))
        os.utime(path, (10**9, 10**9))
        assert word in decode(mixture(source).batch(0).tokens[0])


def test_held_out_splits_of_one_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        records = [{"t": f"{folder} {i}", "u": "x" * 9} for i in range(40)]
        write_jsonl(tmp_path / folder / "data.jsonl", records)
    one = Source(dataset=str(tmp_path / "a/data.jsonl"), text="t", held_out="train")
    two = dataclasses.replace(one, dataset=str(tmp_path / "b/data.jsonl"))
    assert [*mixture(one).held_out] == ["data.jsonl:train"]
    both = mixture(one, two, one).held_out
    assert [*both] == [f"{source.dataset}:train" for source in (one, two)]
    read = [decode(reader.take(64).tokens) for reader in both.values()]
    assert read[0].startswith("a ") and read[1].startswith("b ")
    columns = mixture(one, dataclasses.replace(one, text="u")).held_out
    assert len(columns) == 2


def test_a_stage_may_hold_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"t": f"text {i}"} for i in range(40)])
    source = Source(dataset=path, text="t", held_out="train[50%:]")
    task = Source(task="fact")
    stages = (dataclasses.replace(STAGES[0], sources=(source,)),)
    assert [*mixture(task, stages=stages).held_out] == ["a.jsonl:train[50%:]"]
    wrong = dataclasses.replace(source, held_out="nosuch")
    stages = (dataclasses.replace(STAGES[0], sources=(wrong,)),)
    with pytest.raises(ValueError, match="no split 'nosuch'"):
        mixture(task, stages=stages)


def test_what_other_programs_write_is_told(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    datasets.Dataset.from_list([{"t": "a"}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"save_to_disk.*to_parquet"):
        mixture(Source(dataset=str(tmp_path / "saved"), text="t"))
    for name in ("a.JSONL", "a.ndjson"):
        path = write_jsonl(tmp_path / name, [{"t": f"text {i}"} for i in range(40)])
        assert "text" in decode(
            mixture(Source(dataset=path, text="t")).batch(0).tokens[0]
        )


@pytest.mark.parametrize("wrong", [OSError(errno.ENOSPC, "No space left"), None])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, wrong):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    cache = str(datasets.config.HF_DATASETS_CACHE)
    wrong = wrong or PermissionError(errno.EACCES, "Permission denied", f"{cache}/x")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("An error occurred") from wrong

    monkeypatch.setattr(datasets.Dataset, "from_generator", refuse)
    path = write_jsonl(tmp_path / "a.jsonl", [{"t": "a"}])
    with pytest.raises(ValueError, match=r"a\.jsonl.*HF_DATASETS_CACHE to a folder"):
        mixture(Source(dataset=path, text="t"))
