"""Which block sizes a kernel is given: the caller's, the chip's, or its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kvjax import axes
from kvjax.pallas_kernels import dispatch, tuning
from kvjax.pallas_kernels.page_score import page_score
from kvjax.pallas_kernels.quantize_pack import quantize_pack

Q, MEANS = jnp.ones((1, 2, 1, 64)), jnp.ones((1, 1, 2048, 64))


@pytest.fixture
def tuned(monkeypatch):
    """`page_score` tuned for one TPU and one GPU."""
    sizes = {"pages": 512}, {"pages": 128}, {"pages": 64}
    table = dict(zip(("default", "v6e", "h200"), sizes, strict=True))
    monkeypatch.setattr(tuning, "table", lambda op: table)


def on(kind: str, platform: str):
    """As if traced for a device of this kind."""
    device = AbstractDevice(kind, None, platform=platform)
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def blocks(monkeypatch, tiles) -> int:
    """Pages per block of the kernel that a call would run."""
    seen = []
    call = pl.pallas_call

    def record(*args, **kwargs):
        seen.append(kwargs)
        return call(*args, **kwargs)

    monkeypatch.setattr(pl, "pallas_call", record)
    how = {"mode": "dot", "group": "max", "backend": "tpu", "tiles": tiles}
    jax.eval_shape(lambda q, a: page_score(q, a, **how), Q, MEANS)
    spec = seen[-1].get("grid_spec")
    specs = seen[-1]["in_specs"] if spec is None else spec.in_specs
    return max(size for size in specs[1].block_shape[:-1] if size)


@pytest.mark.parametrize(
    ("kind", "tiles", "pages"),
    [
        ("TPU v6 lite", None, 128),
        ("TPU v6 lite", {"pages": 256}, 256),
        ("TPU v6 lite", "v6e", 128),
        ("TPU v5 lite", None, 512),  # nothing is tuned for it
        ("TPU v5 lite", "v6e", 128),
        ("TPU v99", None, 512),
    ],
)
def test_the_chip_of_the_mesh_decides(tuned, monkeypatch, kind, tiles, pages):
    with on(kind, "tpu"):
        assert blocks(monkeypatch, tiles) == pages


def test_a_chip_of_another_backend_does_not(tuned):
    with on("NVIDIA H200", "cuda"):
        assert dispatch.chip() == "h200"
        assert dispatch.block_sizes("page_score", "tpu", None) is None
        assert dispatch.block_sizes("page_score", "gpu", None) == {"pages": 64}


def test_the_attached_device_decides_without_a_mesh(tuned, monkeypatch):
    assert dispatch.chip() is None  # the tests run on CPUs
    device = AbstractDevice("TPU v6 lite", None, platform="tpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert dispatch.block_sizes("page_score", "tpu", None) == {"pages": 128}


@pytest.mark.parametrize("chip", ["v99", "h200"])
def test_unknown_chips(chip):
    how = {"mode": "dot", "group": "max", "backend": "tpu", "tiles": chip}
    with pytest.raises(ValueError, match="`tiles` must be block sizes, or one of"):
        page_score(Q, MEANS, **how)


def test_what_is_split_over_devices_gets_no_kernel():
    """XLA's partitioner cannot split one; inside of `shard_map` nothing is left."""

    def split(size: int, kind: AxisType) -> bool:
        device = AbstractDevice("TPU v6 lite", None, platform="tpu")
        mesh = AbstractMesh((size,), ("x",), (kind,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return dispatch.partitioned()

    assert not dispatch.partitioned()
    assert split(2, AxisType.Auto)
    assert not split(1, AxisType.Auto) and not split(2, AxisType.Manual)


def test_with_rules_a_kernel_runs_on_each_device():
    """The automatic choice is the chip's kernel, under a `shard_map` of its own."""
    device = AbstractDevice("TPU v6 lite", None, platform="tpu")
    mesh = AbstractMesh(
        (2, 2), ("data", "model"), (AxisType.Auto,) * 2, abstract_device=device
    )
    rules = (("batch", "data"), ("kv_heads", "model"))
    x, live = jnp.ones((2, 4, 64, 128)), jnp.ones((2, 4, 64), bool)

    def program(rules) -> str:
        def run(x, live):
            return quantize_pack(x, live, bits=4, axis="token", group=32)

        with axes.split(mesh, rules):
            return str(jax.make_jaxpr(run)(x, live))

    assert "pallas_call" not in program(())
    found = program(rules)
    assert "pallas_call" in found and "shard_map" in found
    assert "f32[1,2,64,128]" in found  # what a device has


def test_unknown_sizes(tuned):
    with on("TPU v6 lite", "tpu"), pytest.raises(ValueError, match="may have"):
        dispatch.block_sizes("page_score", "tpu", {"slots": np.int32(1)})
