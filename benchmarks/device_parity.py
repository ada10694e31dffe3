"""Every kernel on the device against its reference, for `device.py`.

The references are computed by processes of their own on the CPU, ahead of the device:
exact float32 there, and none of the device's time is spent on compiling them.

    python benchmarks/device_parity.py 0 4 --first 12    cases 12, 16, ... as pickles
"""

import argparse
import functools
import os
import pickle
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_stages import Context, Rows, in_turns

from kvjax.pallas_kernels.cases import Case
from kvjax.pallas_kernels.compat import gpu_target
from kvjax.pallas_kernels.parity import (
    BOUNDS,
    arguments,
    dtype_of,
    gradients,
    options,
    public,
    served,
    worst,
)

DRY = ("page_summary", "page_score", "quantize_pack", "decode_attention")
"""Ops whose first case the dry form puts through the interpreter of GPU kernels."""


def cases(dry: bool) -> list[tuple[str, Case]]:
    """Op and case of every row: the first case of every op, then the second."""
    every = list(served("gpu"))
    if not dry:
        ops = dict.fromkeys(name for name, _ in every)
        lists = [(op, [c for name, c in every if name == op]) for op in ops]
        return list(in_turns(lists))
    return [next(one for one in every if one[0] == name) for name in DRY]


def expected(name: str, case: Case) -> tuple[Any, ...]:
    """Arguments, what the reference makes of them, and its gradients or None."""
    args, kwargs = arguments(name, case)
    how = {"backend": "reference"}
    want = public(name)(*args, **kwargs, **how)
    slopes = gradients(name, case, args, kwargs, how) if case.gradient else None
    return jax.tree.map(_as_numpy, (args, kwargs, want, slopes))


def _as_numpy(x: Any) -> Any:
    return np.asarray(x) if isinstance(x, jax.Array) else x


class References:
    """Processes that compute what is expected, each every n-th case in order."""

    def __init__(self, dry: bool, first: int):
        count = 1 if dry else max(1, min(4, (os.cpu_count() or 1) // 2))
        command = [sys.executable, __file__, "--first", str(first)]
        command += ["--dry"] if dry else []
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self.workers = [
            subprocess.Popen(
                [*command, str(number), str(count)],
                stdout=subprocess.PIPE,
                env=environment,
            )
            for number in range(count)
        ]

    def get(self, number: int) -> tuple[Any, ...]:
        """Of the case with that number; each once, in order."""
        stream = self.workers[number % len(self.workers)].stdout
        assert stream is not None
        at, value = pickle.load(stream)
        if isinstance(value, Exception):
            raise value
        assert at == number, f"case {at} came for case {number}"
        return value


def compared(number: int, name: str, case: Case, dry: bool, ahead: References) -> dict:
    """How far a kernel is from its reference."""
    host = ahead.get(number)
    bound = BOUNDS[dtype_of(host[0])]
    args, kwargs, want, slopes = jax.tree.map(_on_device, host)
    how = options("gpu", case, interpret=dry)
    arrays = {n: x for n, x in kwargs.items() if jax.tree.leaves(x) and _arrays(x)}
    fixed = {n: x for n, x in kwargs.items() if n not in arrays}
    run = jax.jit(functools.partial(public(name), **fixed, **how))
    with gpu_target(dry):
        row: dict[str, Any] = {
            "apart": worst(run(*args, **arrays), want),
            "bound": bound,
        }
        if slopes is not None:
            got = gradients(name, case, args, kwargs, how)
            row["gradient_apart"] = worst(got, slopes)
    most = max(row["apart"], row.get("gradient_apart", 0.0))
    if most > bound:
        row["error"] = f"{most:.3g} apart, bound {bound}"
    return row


def _on_device(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _arrays(value: Any) -> bool:
    return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))


def parity(context: Context) -> Rows:
    """A row for every case that a GPU kernel serves."""
    ahead = References(context.dry, context.first)  # at work while the device starts
    return [
        (
            f"{name} {case.name}",
            functools.partial(compared, i, name, case, context.dry, ahead),
        )
        for i, (name, case) in enumerate(cases(context.dry))
    ]


def main() -> int:
    """Compute references and write them, for the process that compares."""
    parser = argparse.ArgumentParser(prog="benchmarks/device_parity.py")
    parser.add_argument("worker", type=int)
    parser.add_argument("workers", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    for number, (name, case) in enumerate(cases(args.dry)):
        if number < args.first or number % args.workers != args.worker:
            continue
        try:
            value: Any = expected(name, case)
        except Exception as wrong:  # told where it is waited for
            value = RuntimeError(f"the reference failed: {wrong}")
        pickle.dump((number, value), sys.stdout.buffer)
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
