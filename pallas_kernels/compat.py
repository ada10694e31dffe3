"""What moves between JAX versions, in one place."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

HOPPER = "NVIDIA H100 80GB HBM3"


def tpu_interpret(interpret: bool) -> Any:
    """The `interpret` argument of a Mosaic TPU kernel; finds races and stale reads."""
    if not interpret:
        return False
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def gpu_interpret(interpret: bool) -> Any:
    """The `interpret` argument of a Mosaic GPU kernel."""
    if not interpret:
        return False
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)


@contextlib.contextmanager
def gpu_target(interpret: bool) -> Iterator[None]:
    """Names a Hopper GPU to the interpreter; on a GPU or its AOT mesh, does nothing."""
    if not interpret:
        yield
        return
    device = jax.sharding.AbstractDevice(HOPPER, None, platform="cuda")
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), abstract_device=device)
    ):
        yield
