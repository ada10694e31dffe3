"""What a dry run says, as far as no compiler of another chip is needed to know it."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
import yaml

from kvjax.cli.main import main
from kvjax.models.bundled import bundled_models, shape_of, shapes
from kvjax.pallas_kernels.compilers import used
from kvjax.pallas_kernels.targets import TARGETS
from kvjax.train.data import Mixture
from kvjax.train.data.sampling import Sampler
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import (
    LoRAConfig,
    MeshConfig,
    ObjectiveConfig,
    as_tree,
    load_config,
)
from kvjax.train.run import dry_run as dry
from kvjax.train.run.abstract import abstract_batch, abstract_state, hardest
from kvjax.train.run.flops import matmul_flops
from kvjax.train.run.mesh import make_mesh
from kvjax.train.run.model import weights_of
from kvjax.train.run.optimizer import make_optimizer
from kvjax.train.run.step import init_state, make_step
from kvjax.types import nbytes
from tests.train.mesh_run import spread_recipe

SHAPED = spread_recipe(
    "plain",
    MeshConfig(),
    lora=LoRAConfig(rank=2),
    objective=ObjectiveConfig(distill=1.0),
    compute="bfloat16",
)


def test_products_are_counted_as_often_as_they_run():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    once = 2 * 3 * 4 * 4

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def count(f) -> int:
        return matmul_flops(jax.make_jaxpr(f)(x, w).jaxpr)

    assert count(lambda x, w: x @ w) == once
    assert count(jax.jit(loop)) == 5 * once
    assert count(branch) == 2 * once
    # Forward, forward again, and a product for each of the two gradients.
    again = jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w)
    both = jax.grad(lambda x, w: again(x, w).sum(), argnums=(0, 1))
    assert count(both) in (7 * once, 8 * once)


def test_shapes_are_those_of_a_run():
    """Of the state and of fixed weights, the teacher's too; and what a step takes."""
    optimizer = make_optimizer(SHAPED.optimizer, SHAPED.steps)
    weights, params = weights_of(SHAPED)
    state = init_state(params, optimizer)
    assert SHAPED.model is not None
    mesh = make_mesh(SHAPED.mesh)
    thought, imagined = abstract_state(SHAPED, SHAPED.model, optimizer, mesh)
    assert not weights.guide  # with LoRA the teacher's weights are the fixed ones
    real = (state, weights.arrays)
    same = jax.tree.map(
        lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype),
        real,
        (imagined, thought.arrays),
    )
    assert all(jax.tree.leaves(same))
    batch = Mixture(SHAPED.data, SHAPED.stages, 0).batch(0)
    rows, width = batch.tokens.shape
    abstract = abstract_batch(rows, width, mesh)
    row = dry.CompiledStep(compression="none", width=64, rows=4, hbm=1 << 30)
    step = make_step(thought, make_objective(SHAPED), optimizer)
    dry.compiled(row, step, (imagined, abstract, thought.arrays))
    assert row.status == "ok", row.reason
    assert row.matmul_flops and row.temporaries and row.total
    assert row.arguments and row.outputs
    # XLA drops what a step does not read, and it reads no compression points here.
    spare = batch.prompt_lengths.nbytes + batch.step.nbytes
    assert abs(nbytes((real, batch)) - row.arguments) <= spare
    assert row.total < row.arguments + row.outputs + row.temporaries  # donated


def test_a_failure_is_a_row():
    row = dry.CompiledStep(compression="none", width=64, rows=4, hbm=1)
    dry.compiled(row, jax.jit(lambda x: x.nothing), (jnp.ones(3),))
    assert row.status == "failed" and "nothing" in row.reason
    said = "RESOURCE_EXHAUSTED: Ran out of memory. Used 21.50G of 15.75G hbm. Exceeded"
    assert used(said) == int(21.5 * (1 << 30))
    said = (
        "total memory required for HLO temporaries (16.88G) exceeds available HBM "
        "(15.75G). HLO module: jit__run."
    )
    assert used(said) == int(16.88 * (1 << 30))


@pytest.mark.parametrize("name", [*shapes(), *bundled_models()])
def test_shapes_are_known_without_weights(name):
    shape = shape_of(name)
    assert shape.num_heads * shape.head_dim >= shape.hidden_size
    assert shape.max_positions >= 2048


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="a config.json or one of .*Llama-3.1-8B"):
        shape_of("meta-llama/Llama-3.1-80B")


def test_the_recipe_for_eight_chips_fits_them():
    config = load_config("lora_llama3_8b")
    shape = dry.abstract_shape(config)
    dry.check_mesh(config, shape, 8)
    assert config.mesh.devices == 8 and config.stages[0].rows(32768) == 8
    assert shape.num_layers == 32 and max(config.stages[0].lengths) == 32768
    samples = Sampler(hardest(config).sampling, 0).samples
    assert [len(choice) for choice in samples] == [1] * 5
    assert samples[-1][0].name == "snapkv_kivi-keep0.25"


@pytest.mark.parametrize(
    ("device", "chips", "said"),
    [
        ("v5", 8, r"Unknown device 'v5'.*Did you mean"),
        ("v5e", 3, r"slices of \[1, 4, 8.*got 3"),
        ("h200", 3, r"slices of \[1, 2, 4, 8\] chips; got 3"),
    ],
)
def test_unknown_chips_are_refused(device, chips, said):
    with pytest.raises(ValueError, match=said):
        dry.dry_run(SHAPED, device, chips)


@pytest.mark.parametrize(
    ("device", "extra"), [("v5e", "kvjax[tpu]"), ("h200", "kvjax[cuda13]")]
)
def test_a_missing_compiler_names_its_extra(device, extra, monkeypatch, capsys):
    monkeypatch.delenv("KVJAX_TPU_PYTHON", raising=False)
    monkeypatch.delenv("KVJAX_CUDA_PYTHON", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ["finetune", "--config", "tolerant", "--dry-run", "--device", device]
    assert main(words) == 2
    assert extra in capsys.readouterr().err


def test_options_that_need_one_another(capsys):
    assert main(["finetune", "--config", "tolerant", "--dry-run"]) == 2
    assert "--dry-run --device v5e --chips 8" in capsys.readouterr().err


def test_a_process_that_ends_is_named(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such compiler >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setenv("KVJAX_TPU_PYTHON", str(python))
    with pytest.raises(ValueError, match="ended with code 3: no such compiler"):
        dry.dry_run(SHAPED, "v5e", 1)


@pytest.mark.slow
@pytest.mark.skipif(
    "KVJAX_TPU_PYTHON" not in os.environ, reason="set KVJAX_TPU_PYTHON: needs libtpu"
)
def test_the_compiler_of_a_chip(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    config = spread_recipe("plain", MeshConfig(fsdp=4))
    path.write_text(yaml.safe_dump(as_tree(config)))
    words = ["finetune", "--config", str(path), "--dry-run", "--device", "v5e"]
    assert main([*words, "--chips", "8"]) == 2
    assert "`mesh` has 4 devices" in capsys.readouterr().err
    assert main([*words, "--chips", "4"]) == 0
    shown = capsys.readouterr().out
    assert "4 x v5e: compiled, not run" in shown and " ok " in shown
    assert TARGETS["v5e"].hbm_bytes == 16 << 30
