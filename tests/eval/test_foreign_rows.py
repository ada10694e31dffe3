"""An evaluation that goes on takes the rows of its own cells, and no others."""

import math
import os
import pathlib
import shutil
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvjax.eval import harness
from kvjax.eval.rows import ITEMS, ROWS
from tests.eval import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    again(path)
    return path


def again(run: pathlib.Path) -> None:
    config = tiny.config(keeps=[0.5], items=3)
    harness.run(tiny.model(), tiny.tokenizer(), config, run)


def rewrite(path: pathlib.Path, schema: pa.Schema, change: Callable) -> None:
    rows = change(pq.read_table(path).to_pylist())
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def test_its_own_rows_are_taken(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = [path.read_bytes() for path in sorted((run / "rows").iterdir())]
    again(run)
    assert [path.read_bytes() for path in sorted((run / "rows").iterdir())] == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cell", "other"),
        ("model", "other"),
        ("task", "chain"),
        ("compression", "h2o"),
        ("keep", 0.75),
        ("seed", 5),
        ("batch", 77),
        ("items", 7),
        ("score", math.nan),
        ("score", 1.5),
        ("agreement", -1.0),
        ("ms_per_token", -1.0),
        ("score_se", -0.5),
        ("resident_bytes", 0.0),
    ],
)
def test_a_row_of_another_cell_is_not_taken(finished, tmp_path, name, value):
    run = shutil.copytree(finished, tmp_path / "run")
    path = sorted((run / "rows").iterdir())[-1]
    rewrite(path, ROWS, lambda rows: [rows[0] | {name: value}])
    with pytest.raises(ValueError, match=f"{path.name}.*'{name}'.*Delete it"):
        again(run)


@pytest.mark.parametrize("change", [lambda r: r[::-1], lambda r: r[:1], lambda r: []])
def test_items_of_another_cell_are_not_taken(finished, tmp_path, change):
    run = shutil.copytree(finished, tmp_path / "run")
    for path in (run / "items").glob("*none*"):
        rewrite(path, ITEMS, change)
        with pytest.raises(ValueError, match=f"{path.name}.*items.*Delete it"):
            again(run)


def test_rows_that_changed_places(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    one, two = sorted((run / "rows").iterdir())[:2]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(ValueError, match="is of another cell: 'cell'"):
        again(run)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("kind", ["rows", "items"])
def test_a_pipe_is_not_waited_for(finished, tmp_path, kind):
    run = shutil.copytree(finished, tmp_path / "run")
    path = sorted((run / kind).iterdir())[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path.name}.*a pipe"):
        again(run)


@pytest.mark.parametrize("kind", ["rows", "items", "maps"])
def test_a_file_where_a_directory_belongs(finished, tmp_path, kind):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / kind)
    (run / kind).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{kind} is no directory"):
        again(run)
