"""Caches on a mesh are those of one device, spread out: in processes of their own."""

import functools
import json
import os
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.tree import ROOT

LIMIT_S = 900
FAST = ("generate/none/", "generate/none/2,2", "moves/none/2,2")
METHODS = (
    "none",
    "pyramidkv",
    "snapkv",
    "kivi_4bit",
    "adakv_snapkv",
    "quest",
    "h2o_decode",
)
MESHES = ("4,1", "1,2", "2,2")
SEQUENCE = ("4,1,slots", "2,2,slots")
LIVED = ("kivi_4bit", "adakv_snapkv", "quest", "h2o_decode")
SPLIT = ("none", "kivi_4bit", "snapkv_kivi")
"""Whose bodies may be split along slots."""


def started(*cases: str, devices: int = 4, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DEVICES": str(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.models.mesh_process", *cases],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def found_by(process: subprocess.Popen) -> dict[str, Any]:
    try:
        out, said = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def fast() -> dict[str, Any]:
    return found_by(started(*FAST))


@functools.lru_cache
def every(name: str) -> dict[str, Any]:
    """A method on all meshes, and on one device."""
    cases = [f"generate/{name}/{mesh}" for mesh in ("", *MESHES)]
    return found_by(started(*cases, *(f"moves/{name}/{mesh}" for mesh in MESHES)))


@pytest.fixture(scope="module")
def lives() -> dict[str, Any]:
    """Prefixes, later tokens and forks, and slots that are split."""
    cases = [f"life/{name}/{mesh}" for name in LIVED for mesh in ("", "2,2")]
    cases += [f"life/kivi_4bit/{SEQUENCE[0]}"]
    for name in SPLIT:
        cases += [f"generate/{name}/"]
        for mesh in SEQUENCE:
            cases += [f"{kind}/{name}/{mesh}" for kind in ("generate", "moves")]
    cases += [
        f"{kind}/snapkv/{mesh}" for kind in ("save", "eval") for mesh in ("", "2,2")
    ]
    cases += ["generate/none/1,4,instead", "moves/none/1,4,instead"]
    cases += [f"refused/{name}/2,2,slots" for name in ("quest", "h2o_decode")]
    cases += ["generate/snapkv/", "generate/adakv_snapkv/"]
    cases += [f"{k}/adakv_snapkv/1,2,shared" for k in ("generate", "moves")]
    return found_by(started(*dict.fromkeys(cases)))


def moves(found: dict[str, Any], name: str, mesh: str) -> list[list[Any]]:
    """Collectives of the loop over layers, in the loop over tokens."""
    return [move for move in found[f"moves/{name}/{mesh}"]["moves"] if move[2]]


def test_a_mesh_gives_the_tokens_of_one_device(fast):
    assert fast["generate/none/2,2"] == fast["generate/none/"]
    tokens = np.array(fast["generate/none/"]["tokens"])
    assert len(np.unique(tokens)) > 4  # they say something


def test_a_step_moves_nothing_of_a_cache(fast):
    """Two sums in a layer, behind o and down, of `[B / data, E]`; nothing else."""
    found = moves(fast, "none", "2,2")
    assert [kind for kind, *_ in found] == ["all-reduce"] * 2
    assert all(shape.startswith("f32[2,16]") for _, shape, _ in found)
    assert fast["moves/none/2,2"]["share"] == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", METHODS)
def test_every_layout_on_every_mesh(name, mesh):
    told = every(name)
    assert told[f"generate/{name}/{mesh}"] == told[f"generate/{name}/"]
    data, heads = map(int, mesh.split(","))
    sums = f"f32[{4 // data},16]"
    # Two layers of a kind are one loop; of two kinds, as in `quest`, they are none.
    found = [m for m in told[f"moves/{name}/{mesh}"]["moves"] if m[2] or sums in m[1]]
    assert len(found) in ((0,) if heads == 1 else (2, 4)), found
    assert all(kind == "all-reduce" and sums in shape for kind, shape, _ in found)
    share = told[f"moves/{name}/{mesh}"]["share"]
    # Slots that all heads share are whole on the devices that split heads.
    ways = data if name == "adakv_snapkv" else data * heads
    assert share == pytest.approx(1 / ways, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVED)
def test_prefixes_and_forks_on_a_mesh(name, lives):
    same(lives[f"life/{name}/2,2"], lives[f"life/{name}/"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SEQUENCE)
@pytest.mark.parametrize("name", SPLIT)
def test_slots_over_devices(name, mesh, lives):
    """Merged by log-sum-exp in two collectives a layer, whose bytes are no slots'."""
    assert lives[f"generate/{name}/{mesh}"] == lives[f"generate/{name}/"]
    found = [kind for kind, *_ in moves(lives, name, mesh)]
    assert found.count("all-to-all") == 1 and found.count("all-gather") == 1
    assert found.count("all-reduce") == (2 if mesh.startswith("2,2") else 0)
    assert len(found) == 2 + found.count("all-reduce")
    ways = 4
    share = lives[f"moves/{name}/{mesh}"]["share"]
    assert share == pytest.approx(1 / ways, rel=0.02)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["tokens"] == wanted["tokens"]
    for name in ("extended", "forked"):
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_prefixes_and_forks_over_slots(lives):
    same(lives[f"life/kivi_4bit/{SEQUENCE[0]}"], lives["life/kivi_4bit/"])


@pytest.mark.slow
def test_heads_share_slots_on_their_device(lives):
    """With a head on each device they share with nobody: every head has the mean.

    Budgets are exact sums: as many slots in all as where all heads share.
    """
    one, spread = lives["generate/snapkv/"], lives["generate/adakv_snapkv/1,2,shared"]
    assert spread == one != lives["generate/adakv_snapkv/"]
    found = lives["moves/adakv_snapkv/1,2,shared"]
    assert found["share"] == pytest.approx(0.5, rel=0.02)
    assert [kind for kind, _, inner in found["moves"] if inner] == ["all-reduce"] * 2


@pytest.mark.slow
def test_a_saved_cache_goes_on_anywhere(lives):
    one, two = lives["save/snapkv/2,2"]["tokens"]
    assert one == two == lives["save/snapkv/"]["tokens"][0]


@pytest.mark.slow
def test_an_evaluation_on_a_mesh(lives):
    assert lives["eval/snapkv/2,2"] == lives["eval/snapkv/"]
    assert lives["eval/snapkv/"]["rows"][0]["score"] is not None


@pytest.mark.slow
def test_heads_that_do_not_divide_split_slots_instead(lives):
    """What the message of `load` says; queries are whole for a moment."""
    assert lives["generate/none/1,4,instead"] == lives["generate/none/"]
    assert lives["moves/none/1,4,instead"]["share"] == 0.25


@pytest.mark.slow
def test_bodies_whose_slots_cannot_be_split(lives):
    for name, what in (("quest", "Pages parts"), ("h2o_decode", "evict from")):
        said = lives[f"refused/{name}/2,2,slots"]["said"]
        assert "split `slots` over 2 devices" in said and what in said
        assert "rules | {'slots': None}" in said


@pytest.mark.slow
def test_a_kernel_runs_on_every_device():
    names = ("quantize_pack", "page_summary", "sparse_prefill")
    found = found_by(started(*(f"kernel/{name}/1,2" for name in names)))
    for name in names:
        one = found[f"kernel/{name}/1,2"]
        assert max(one["errors"]) < 1e-5 and "model" in one["specs"][0], (name, one)


@pytest.mark.slow
def test_two_processes_decode_together():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        started(
            "generate/kivi_4bit/2,1",
            devices=1,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(own),
        )
        for own in range(2)
    ]
    try:
        told = [found_by(process) for process in both]
    finally:
        for process in both:  # one waits for the other, should that have failed
            process.kill()
            process.communicate()
    alone = found_by(started("generate/kivi_4bit/", devices=1))
    for one in told:
        assert one["generate/kivi_4bit/2,1"] == alone["generate/kivi_4bit/"]
