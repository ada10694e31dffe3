"""Several processes that train one model: who speaks, and how they agree.

With one process all of this does nothing.
"""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Join the processes of this run; before anything else asks JAX for its devices.

    On TPU pods, Slurm and Open MPI JAX finds the others itself. Elsewhere `VARIABLES`
    say who they are.

    Raises:
        ValueError: some of `VARIABLES` are set and not all, or are no numbers.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not given:
        jax.distributed.initialize()
        return
    address, *counts = (given.get(name, "") for name in VARIABLES)
    if not address or not all(count.isdecimal() for count in counts):
        raise ValueError(
            f"several processes need {', '.join(VARIABLES)}, the last two whole "
            f"numbers; got {given}. Set all of them, or none where the cluster tells."
        )
    total, own = map(int, counts)
    jax.distributed.initialize(address, num_processes=total, process_id=own)


def first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here; `name` must be the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(flag: bool) -> bool:
    """Whether any process says so; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
