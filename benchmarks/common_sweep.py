"""What sweeps against kvpress share: our side in processes of their own, and theirs."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import HERE

import kvjax
from kvjax.eval.config import decode_config
from kvjax.eval.framing import limit
from kvjax.eval.plan import EvalPlan, plan
from kvjax.eval.questions import QuestionGroup

OURS = """
import json, resource, sys, kvjax
from kvjax.eval.config import decode_config
from kvjax.eval.harness import run
model, tokenizer = kvjax.load(sys.argv[1], dtype="float32")
run(model, tokenizer, decode_config(json.loads(sys.argv[2])), sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def planned(path: str, tree: dict[str, Any]) -> EvalPlan:
    """The evaluation that both sides run."""
    model, tokenizer = kvjax.load(path, dtype="float32")
    return plan(model.config, tokenizer, decode_config(tree))


def ours(
    path: str,
    tree: dict[str, Any],
    folder: pathlib.Path,
    names: Sequence[str] = ("cold", "warm"),
) -> dict[str, Any]:
    """Seconds of the whole sweep, process start to end: cold, then warm."""
    out: dict[str, Any] = {}
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for name in names:
        command = [sys.executable, "-c", OURS, path, json.dumps(tree)]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, str(folder / name)],
            check=True,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        out[f"kvjax_{name}_s"] = round(time.perf_counter() - start, 1)
        out[f"kvjax_{name}_peak_mib"] = round(float(done.stdout.split()[-1]))
    return out


def theirs(
    path: str,
    made: EvalPlan,
    items: int,
    methods: Sequence[str],
    keeps: Sequence[float],
    folder: pathlib.Path,
    fields: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Kvpress on the first `items` of every group, and its seconds for all items.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    groups = [one for one in made.groups if isinstance(one, QuestionGroup)]
    stops = {token for one in groups for token in one.framing.stops(one.task)}
    work = {
        "methods": list(methods),
        "keeps": list(keeps),
        "fields": fields or {},
        "stops": sorted(stops),
        "groups": [
            {
                "name": group_name(one),
                "prompts": one.prompts[:items],
                "asked": [asked[0] for asked in one.asked[:items]],
                "new": [
                    limit(one.task, episode.turns[0])
                    for episode in one.episodes[:items]
                ],
            }
            for one in groups
        ],
    }
    file = folder / "work.json"
    file.write_text(json.dumps(work))
    python = os.environ.get("KVJAX_TORCH_PYTHON") or sys.executable
    start = time.perf_counter()
    done = subprocess.run(
        [python, str(HERE / "torch_sweep.py"), path, str(file)],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError("kvpress failed; see above.")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    shares = {
        group_name(one): len(one.prompts) / min(items, len(one.prompts))
        for one in groups
    }
    scaled = sum(cell["seconds"] * shares[cell["group"]] for cell in found["cells"])
    return found | {
        "kvpress_scaled_s": round(scaled + found["load_s"], 1),
        "kvpress_process_s": round(time.perf_counter() - start, 1),
    }


def group_name(group: QuestionGroup) -> str:
    """As names of cells begin."""
    return f"{group.title}-{group.length}-{group.visibility}"
