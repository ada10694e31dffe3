"""Greedy decoding of a full cache: kvjax against transformers on torch, both on CPU.

Same weights, prompts and float32 in both; prefill and compilation are left out of
both. `KVJAX_TORCH_PYTHON` names an interpreter with torch; without it this one is
tried, and without torch only kvjax is timed.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from common import HERE, arguments, decode_ms, large, random_model, report

import kvjax


def torch_side(folder: pathlib.Path, prompt, new: int, repeats: int) -> dict:
    np.save(folder / "prompt.npy", prompt)
    python = os.environ.get("KVJAX_TORCH_PYTHON") or sys.executable
    paths = (HERE / "torch_decode.py", folder, folder / "prompt.npy")
    command = [python, *map(str, paths), str(new), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(model, folder, batch: int, length: int, new: int, repeats: int) -> dict:
    draw = np.random.default_rng(0)
    prompt = draw.integers(3, model.config.vocab_size, (batch, length), dtype=np.int32)
    logits, cache = kvjax.prefill(model, prompt, max_new_tokens=new)
    ours = kvjax.generate_from(model, cache, logits, max_new_tokens=new).tokens
    ms = decode_ms(model, cache, new, repeats)
    row = {"batch": batch, "length": length, "kvjax_tokens_s": 1e3 * batch / ms}
    theirs = torch_side(folder, prompt, new, repeats)
    runs = theirs.pop("results", {})
    good = {name: run for name, run in runs.items() if "tokens" in run}
    if not good:
        return {**row, **theirs, "runs": runs}
    best = min(good, key=lambda name: good[name]["ms_per_token"])
    row["torch_tokens_s"] = 1e3 * batch / good[best]["ms_per_token"]
    row["ratio"] = row["kvjax_tokens_s"] / row["torch_tokens_s"]
    same = np.asarray(ours) == np.asarray(good[best]["tokens"])
    row["same_tokens"] = float(same.mean())
    return {**row, "torch_cache": best, **theirs}


def main() -> int:
    args = arguments(
        __doc__,
        name="decode",
        models=["tiny", "large"],
        batches=[1, 8],
        tiny_length=512,
        large_length=4096,
        tokens=32,
        repeats=3,
    )
    results = []
    for name in args.models:
        tiny = name == "tiny"
        if tiny:
            model, _ = kvjax.load(
                HERE.parent / "configs/model/kvjax-tiny", dtype="float32"
            )
        else:
            model = random_model(large())
        length = args.tiny_length if tiny else args.large_length
        with tempfile.TemporaryDirectory() as folder:
            kvjax.save(model, folder)
            for batch in args.batches:
                sizes = (batch, length, args.tokens, args.repeats)
                row = compare(model, pathlib.Path(folder), *sizes)
                results.append({"model": name, **row})
    return report(args.name, vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
