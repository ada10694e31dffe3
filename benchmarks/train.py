"""A training step: plain, under simulated compression, and with transformers on torch.

The same weights, tokens and AdamW in all of them; one run. Two simulated steps: with an
eighth of each row behind its compression point, and ("most") with three quarters and a
gradient for the choice of tokens. Temporaries of the compiled step are measured at two
widths, with and without recomputed layers.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from common import HERE, arguments, report
from common_train import BOTH, Steps

import kvjax
from kvjax.models.bundled import model_directory


def torch_side(tokens: np.ndarray, repeats: int) -> dict:
    python = os.environ.get("KVJAX_TORCH_PYTHON") or sys.executable
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        model, _ = kvjax.load(model_directory("kvjax-tiny"), dtype="float32")
        kvjax.save(model, path)
        np.save(path / "tokens.npy", tokens)
        script, given = HERE / "torch_train.py", (path, path / "tokens.npy", repeats)
        command = [python, *map(str, (script, *given))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    args = arguments(__doc__, name="train", width=1024, rows=4, repeats=7)
    c = kvjax.compression("snapkv_kivi", **BOTH)
    sizes = (args.rows, args.width)
    plain = Steps(None, *sizes)
    steps = (plain, Steps(c, *sizes), Steps(c, *sizes, most=True))
    for one in steps:
        one.run()
    for _ in range(args.repeats):  # in turns: a busy machine is busy for all
        for one in steps:
            one.times.append(one.run())
    ours, under, most = (statistics.median(one.times) for one in steps)
    theirs = torch_side(np.asarray(plain.batch.tokens), args.repeats)
    temps = {
        f"{name}{'-remat' if remat else ''}@{width}": Steps(
            how, args.rows, width, remat
        ).temp_mb
        for name, how in (("plain", None), ("simulated", c))
        for remat in (False, True)
        for width in (args.width, 2 * args.width)
    }
    tokens = args.rows * args.width
    results = {
        "plain_ms": ours,
        "simulated_ms": under,
        "simulated_over_plain": under / ours,
        "simulated_most_ms": most,
        "simulated_most_over_plain": most / ours,
        "tokens_s": 1e3 * tokens / ours,
        "torch": theirs,
        "torch_over_plain": theirs.get("step_ms", float("nan")) / ours,
        "temp_mb": temps,
    }
    if "error" in theirs:
        results["torch_over_plain"] = None
    return report(args.name, vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
