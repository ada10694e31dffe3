"""Host memory of a load, and parameters on a mesh, measured in another process."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from flax import nnx

from kvjax.models import Decoder, save
from kvjax.models.sharding import RULES, parameter_axes

from .samples import CONFIGS, sample

BIG = dict(vocab_size=16_384, hidden_size=512, intermediate_size=1024)


@pytest.fixture(scope="module")
def measured(repo, tmp_path_factory):
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("measures memory through /proc")
    folder = tmp_path_factory.mktemp("placement")
    config = dataclasses.replace(CONFIGS["mistral"], **BIG)
    save(Decoder(config, rngs=nnx.Rngs(0)), folder / "big")
    save(sample("mistral"), folder / "small")
    command = [sys.executable, "-m", "tests.models.load_process"]
    done = subprocess.run(
        [*command, folder / "big", folder / "small"],
        cwd=repo,
        env=os.environ | {"PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_load_holds_little_more_than_the_model(measured, dtype):
    memory = measured["memory"][dtype]
    assert memory["largest"] > 15e6
    assert memory["peak"] > 0.8 * memory["model"], "nothing was measured"
    assert memory["peak"] - memory["model"] < 1.3 * memory["largest"]


def test_a_mesh_changes_where_parameters_are_and_nothing_else(measured):
    mesh = measured["mesh"]
    assert mesh["difference"] < 1e-5 and mesh["again"] == 0
    layers, inward, outward = mesh["shape"]
    assert mesh["held"] == [layers, inward, outward // 2]


def test_arrays_on_other_devices_are_told(measured):
    """JAX's own words name arguments of a program that nobody has seen."""
    cache, logits, model, prefix = measured["places"]
    assert "`cache` lies on cpu:0 and `tokens` on cpu:1" in cache
    assert "`cache` lies on cpu:0 and `logits` on cpu:1" in logits
    assert "`model` lies on cpu:0, cpu:1 and `tokens` on" in model
    assert "`tokens` lies on cpu:1 and `prefix` on cpu:0" in prefix


def test_heads_that_do_not_divide(measured):
    refused, allowed = measured["mesh"]["errors"]
    assert "'kv_heads' of size 2 does not divide over mesh axis 'model'" in refused
    assert "`rules=RULES | {'kv_heads': None}`" in refused
    assert allowed == ""


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_matrix_has_logical_axes(family):
    for path, leaf in nnx.to_flat_state(nnx.state(sample(family))):
        array = leaf.get_value()
        axes = parameter_axes(".".join(map(str, path)), array.ndim)
        assert len(axes) == array.ndim
        vector = array.ndim - ("layers" in path) == 1
        assert vector or set(axes) <= set(RULES)
