"""Caches on a mesh are those of one device, spread out: in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.tree import ROOT

LIMIT_S = 900
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


class Found:
    """What cases come to, each run when it is first asked for, in one process."""

    def __init__(self, *, devices: int = 4, **variables: str):
        self._known: dict[str, Any] = {}
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.models.mesh_process"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "DEVICES": str(devices)}
            | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def asked(self, case: str) -> None:
        """Let it run, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()

    def told(self) -> Any:
        """What the case that was asked for came to."""
        assert self._process.stdout is not None
        late = threading.Timer(LIMIT_S, self._process.kill)
        late.start()
        line = " "
        while line and not line.startswith("{"):  # what a library says in between
            line = self._process.stdout.readline()
        late.cancel()
        self._said.seek(0)
        assert line, self._said.read()
        told = json.loads(line)
        assert "wrong" not in told, told["wrong"]
        return told

    def __getitem__(self, case: str) -> Any:
        if case not in self._known:
            self.asked(case)
            self._known[case] = self.told()
        return self._known[case]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()


@pytest.fixture(scope="module")
def cases() -> Iterator[Found]:
    process = Found()
    yield process
    process.close()


def moves(cases: Found, name: str, mesh: str) -> list[list[Any]]:
    """Collectives of the loop over layers, in the loop over tokens."""
    return [move for move in cases[f"moves/{name}/{mesh}"]["moves"] if move[2]]


def test_a_mesh_gives_the_tokens_of_one_device(cases):
    assert cases["generate/none/2,2"] == cases["generate/none/"]
    tokens = np.array(cases["generate/none/"]["tokens"])
    assert len(np.unique(tokens)) > 4  # they say something


def test_a_step_moves_nothing_of_a_cache(cases):
    """Two sums in a layer, behind o and down, of `[B / data, E]`; nothing else."""
    found = moves(cases, "none", "2,2")
    assert [kind for kind, *_ in found] == ["all-reduce"] * 2
    assert all(shape.startswith("f32[2,16]") for _, shape, _ in found)
    assert cases["moves/none/2,2"]["share"] == 0.25
    assert cases["moves/none/2,2"]["planned"] == pytest.approx(1, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", METHODS)
def test_every_layout_on_every_mesh(name, mesh, cases):
    assert cases[f"generate/{name}/{mesh}"] == cases[f"generate/{name}/"]
    data, heads = map(int, mesh.split(","))
    sums = f"f32[{4 // data},16]"
    # Two layers of a kind are one loop; of two kinds, as in `quest`, they are none.
    found = [m for m in cases[f"moves/{name}/{mesh}"]["moves"] if m[2] or sums in m[1]]
    assert len(found) in ((0,) if heads == 1 else (2, 4)), found
    assert all(kind == "all-reduce" and sums in shape for kind, shape, _ in found)
    share = cases[f"moves/{name}/{mesh}"]["share"]
    # Slots that all heads share are whole on the devices that split heads.
    ways = data if name == "adakv_snapkv" else data * heads
    assert share == pytest.approx(1 / ways, rel=0.02)
    planned = cases[f"moves/{name}/{mesh}"]["planned"]
    assert planned == pytest.approx(1, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVED)
def test_prefixes_and_forks_on_a_mesh(name, cases):
    same(cases[f"life/{name}/2,2"], cases[f"life/{name}/"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SEQUENCE)
@pytest.mark.parametrize("name", SPLIT)
def test_slots_over_devices(name, mesh, cases):
    """Merged by log-sum-exp in two collectives a layer, whose bytes are no slots'."""
    assert cases[f"generate/{name}/{mesh}"] == cases[f"generate/{name}/"]
    found = [kind for kind, *_ in moves(cases, name, mesh)]
    assert found.count("all-to-all") == 1 and found.count("all-gather") == 1
    assert found.count("all-reduce") == (2 if mesh.startswith("2,2") else 0)
    assert len(found) == 2 + found.count("all-reduce")
    ways = 4
    share = cases[f"moves/{name}/{mesh}"]["share"]
    assert share == pytest.approx(1 / ways, rel=0.02)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["tokens"] == wanted["tokens"]
    for name in ("extended", "forked"):
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_prefixes_and_forks_over_slots(cases):
    same(cases[f"life/kivi_4bit/{SEQUENCE[0]}"], cases["life/kivi_4bit/"])


@pytest.mark.slow
def test_heads_share_slots_on_their_device(cases):
    """With a head on each device they share with nobody: every head has the mean.

    Budgets are exact sums: as many slots in all as where all heads share.
    """
    one, spread = cases["generate/snapkv/"], cases["generate/adakv_snapkv/1,2,shared"]
    assert spread == one != cases["generate/adakv_snapkv/"]
    found = cases["moves/adakv_snapkv/1,2,shared"]
    assert found["share"] == pytest.approx(0.5, rel=0.02)
    assert [kind for kind, _, inner in found["moves"] if inner] == ["all-reduce"] * 2


@pytest.mark.slow
def test_a_saved_cache_goes_on_anywhere(cases):
    one, two = cases["save/snapkv/2,2"]["tokens"]
    assert one == two == cases["save/snapkv/"]["tokens"][0]


@pytest.mark.slow
def test_an_evaluation_on_a_mesh(cases):
    assert cases["eval/snapkv/2,2"] == cases["eval/snapkv/"]
    assert cases["eval/snapkv/"]["rows"][0]["score"] is not None


@pytest.mark.slow
def test_heads_that_do_not_divide_split_slots_instead(cases):
    """What the message of `load` says; queries are whole for a moment."""
    assert cases["generate/none/1,4,instead"] == cases["generate/none/"]
    assert cases["moves/none/1,4,instead"]["share"] == 0.25


@pytest.mark.slow
def test_bodies_whose_slots_cannot_be_split(cases):
    for name, what in (("quest", "Pages parts"), ("h2o_decode", "evict from")):
        said = cases[f"refused/{name}/2,2,slots"]["said"]
        assert "split `slots` over 2 devices" in said and what in said
        assert "rules | {'slots': None}" in said


@pytest.mark.slow
@pytest.mark.parametrize("op", ["quantize_pack", "page_summary", "sparse_prefill"])
def test_a_kernel_runs_on_every_device(op, cases):
    one = cases[f"kernel/{op}/1,2"]
    assert max(one["errors"]) < 1e-5 and "model" in one["specs"][0], one


@pytest.mark.slow
def test_two_processes_decode_together(cases):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        Found(
            devices=1,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(own),
        )
        for own in range(2)
    ]
    try:
        for process in both:  # each waits for the other
            process.asked("generate/kivi_4bit/2,1")
        told = [process.told() for process in both]
    finally:
        for process in both:
            process.close()
    assert told == [cases["generate/kivi_4bit/"]] * 2
