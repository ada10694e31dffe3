"""A run over several devices or processes is the run of one device, spread out."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import kvjax
from kvjax.models.io import save
from kvjax.train.data import Mixture
from kvjax.train.data.share import WHOLE, RowShare
from kvjax.train.recipe import CachedConfig, KeepConfig, MeshConfig, Source, Stage
from kvjax.train.run import run
from kvjax.train.run.mesh import check_mesh
from kvjax.train.run.model import initial
from kvjax.train.run.params import leaves_of
from tests.train.mesh_run import LEARNED, mesh_of, spread_recipe
from tests.train.tiny_run import losses
from tests.tree import ROOT

ONE = "1,1,1"
MESHES = ("4,1,1", "1,4,1", "2,1,2")
FOUR, TWO = "1,2,2", "1,2,1"
LIMIT_S = 900
NARROW = Stage(steps=1, lengths={64: 1.0}, tokens_per_step=128)


def started(directory: pathlib.Path, *words: str, devices: int = 4, **variables: str):
    """A process of `mesh_run`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DEVICES": str(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.mesh_run", directory, *words],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen) -> str:
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


def two_processes(directory: pathlib.Path, *words: str) -> list[str]:
    """What both processes of a run said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        started(
            directory,
            *words,
            devices=1,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(own),
        )
        for own in range(2)
    ]
    try:
        return [finished(process) for process in both]
    finally:
        for process in both:  # one waits for the other, should that have failed
            process.kill()
            process.communicate()


def agree(found: pathlib.Path, wanted: pathlib.Path) -> None:
    """Same steps, and the same losses but for the order of sums."""
    ours, theirs = losses(found), losses(wanted)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    np.testing.assert_allclose(
        [loss for _, loss in ours], [loss for _, loss in theirs], atol=1e-5, rtol=0
    )


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> pathlib.Path:
    """Plain runs on every mesh, and on one device."""
    directory = tmp_path_factory.mktemp("spread")
    finished(started(directory, *(f"plain/{mesh}" for mesh in (ONE, *MESHES))))
    return directory / "plain"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> pathlib.Path:
    """Runs of other kinds on one mesh and on one device, by one process.

    The one that counts live arrays comes first.
    """
    directory = tmp_path_factory.mktemp("kinds")
    names = [f"followed/{FOUR}"]
    for kind in ("followed", "cached", "sampled", "chunked", *LEARNED):
        names += [f"{kind}/{mesh}" for mesh in (ONE, FOUR)]
    finished(started(directory, *dict.fromkeys(names)))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_devices_share_one_run(spread, mesh):
    agree(spread / mesh, spread / ONE)
    assert len(losses(spread / ONE)) == 6
    held = json.loads((spread / mesh / "held.json").read_text())
    split = {"4,1,1": 1.0, "1,4,1": 0.25, "2,1,2": 0.5}[mesh]
    assert split <= held < split + 0.1  # norms and counts are everywhere


@pytest.mark.slow
def test_the_state_of_one_device_is_whole(spread):
    assert json.loads((spread / ONE / "held.json").read_text()) == 1.0


@pytest.mark.slow
def test_replies_through_the_cache_of_a_mesh(kinds):
    """Those of one device, by programs whose ops know that they are split."""
    runs = kinds / "cached"
    agree(runs / FOUR, runs / ONE)
    spread, whole = (
        json.loads((runs / name / "heard.json").read_text()) for name in (FOUR, ONE)
    )
    assert [len(items) for items in spread["replies"]] == [2, 2]  # full, and snapkv
    assert spread["replies"] == whole["replies"]
    # Inside of a step each device is by itself.
    assert set(spread["partitions"]) == {1, 4} and set(whole["partitions"]) == {1}


@pytest.mark.slow
def test_sampled_compression_and_a_teacher_on_a_mesh(kinds):
    agree(kinds / "sampled" / FOUR, kinds / "sampled" / ONE)


@pytest.mark.slow
def test_rows_in_chunks_on_a_mesh(kinds):
    """With a full cache and with a bounded one, split along rows and heads."""
    agree(kinds / "chunked" / FOUR, kinds / "chunked" / ONE)


@pytest.mark.slow
def test_a_teacher_on_a_mesh_has_no_weights_of_its_own(kinds):
    """There is one copy of what LoRA leaves as it is."""
    runs = kinds / "followed"
    agree(runs / FOUR, runs / ONE)
    heard = json.loads((runs / FOUR / "heard.json").read_text())
    frozen, alive = heard["frozen"]
    assert alive == frozen > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNED)
def test_learned_methods_on_a_mesh(kind, kinds):
    agree(kinds / kind / FOUR, kinds / kind / ONE)
    first, *_, last = (loss for _, loss in losses(kinds / kind / ONE))
    assert abs(last - first) > 1e-3  # a hundred times what is let pass


@pytest.mark.slow
def test_two_processes_share_one_run_and_go_on(tmp_path):
    name = f"sampled/{TWO}"
    said = two_processes(tmp_path, name)
    assert "step 6" in said[0] and "step " not in said[1]
    whole = tmp_path / "whole"
    run(spread_recipe("sampled", mesh_of(ONE)), whole)
    agree(tmp_path / name, whole)
    first = losses(tmp_path / name)
    shutil.rmtree(tmp_path / name / "checkpoints" / "step_6")
    shutil.copytree(tmp_path / name, tmp_path / "alone")
    two_processes(tmp_path, name)
    assert losses(tmp_path / name) == first  # bit for bit
    # One device goes on from what two processes saved.
    run(spread_recipe("sampled", mesh_of(ONE)), tmp_path / "alone")
    agree(tmp_path / "alone", whole)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True])
def test_two_processes_start_from_one_projection(loaded, tmp_path):
    name, config = f"projection/{TWO}", spread_recipe("projection", mesh_of(ONE))
    if loaded:
        save(initial(config), tmp_path / "start")
        start = str(tmp_path / "start")
        config = dataclasses.replace(config, model=None, init=start)
    two_processes(tmp_path, name)
    run(config, tmp_path / "whole")
    agree(tmp_path / name, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_export_one_merged_model(tmp_path):
    name = f"lora/{TWO}"
    two_processes(tmp_path, name)
    run(spread_recipe("lora", mesh_of(ONE)), tmp_path / "whole")
    found, wanted = (
        leaves_of(kvjax.load(tmp_path / where / "model", "float32")[0])
        for where in (name, "whole")
    )
    assert not any("lora" in leaf for leaf in found)
    assert found.keys() == wanted.keys()
    fresh = leaves_of(initial(spread_recipe("lora", mesh_of(ONE))))
    moved = max(float(abs(wanted[leaf] - x).max()) for leaf, x in fresh.items())
    error = max(float(abs(wanted[leaf] - x).max()) for leaf, x in found.items())
    assert moved > 10 * error  # the updates are there, and they are the same


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mesh": MeshConfig(data=8)}, r"asks for data 8 .* = 8 devices; .* have 4"),
        ({"mesh": MeshConfig(tensor=4)}, r"num_kv_heads of 2 .* mesh\.tensor=4"),
        ({"mesh": MeshConfig(fsdp=3)}, r"hidden_size of 16 .* mesh\.fsdp=3"),
        ({"stages": (NARROW,)}, r"2 rows of 64 tokens .* multiple of 256"),
        ({"eval_items": 3}, "`eval_items` of 3"),
    ],
    ids=["devices", "heads", "width", "rows", "held-out"],
)
def test_what_does_not_divide_is_named(change, said):
    fields = {"mesh": MeshConfig(data=2, fsdp=2), **change}
    config = spread_recipe("plain", **fields)
    assert config.model is not None
    with pytest.raises(ValueError, match=said):
        check_mesh(config, config.model, 4)


def test_a_bad_mesh_stops_before_anything_is_made(tmp_path):
    config = spread_recipe("plain", MeshConfig(data=jax.device_count() + 1))
    with pytest.raises(ValueError, match="Their product must be at most"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="fsdp` must be an integer >= 1; got 0"):
        MeshConfig(fsdp=0)


def test_the_cached_evaluation_is_for_one_process(monkeypatch):
    config = spread_recipe("plain", MeshConfig(data=2), cached=CachedConfig(items=8))
    assert config.model is not None
    check_mesh(config, config.model, 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="Set `cached.items=0`: .*`kvjax eval`"):
        check_mesh(config, config.model, 2)
    kept = dataclasses.replace(config, keep=KeepConfig(metric="cached_loss"))
    with pytest.raises(ValueError, match="=0` and `keep.metric=answer_loss`"):
        check_mesh(kept, config.model, 2)


@pytest.mark.parametrize("kind", ["task", "text"])
def test_shares_are_the_rows_of_the_batch(kind, tmp_path):
    (tmp_path / "notes.txt").write_text("some words to read, and some more\n" * 90)
    config = spread_recipe("plain", MeshConfig())
    sources = config.data.sources
    if kind == "text":
        sources = (Source(dataset=str(tmp_path / "notes.txt"), text="text"),)
    data = dataclasses.replace(config.data, sources=sources)
    parts = [RowShare(first=0, last=1, ways=4), RowShare(first=1, last=4, ways=4)]
    whole, *shared = (
        Mixture(data, config.stages, 0, 0.5, share=share) for share in (WHOLE, *parts)
    )
    for step in (0, 3):
        wanted, found = whole.batch(step), [one.batch(step) for one in shared]
        for name in ("tokens", "weights", "answers", "prompt_lengths"):
            rows = np.concatenate([getattr(one, name) for one in found])
            np.testing.assert_array_equal(rows, getattr(wanted, name))
        assert [one.later for one in found] == [64, 64]
        for one in shared:  # all rows, where one process needs them
            again = one.batch(step, WHOLE)
            np.testing.assert_array_equal(again.tokens, wanted.tokens)
            assert again.later == wanted.later
    assert [part.of(n) for part, n in zip(parts, (1, 3), strict=True)] == [4, 4]
