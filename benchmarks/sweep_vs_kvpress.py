"""An evaluation sweep: kvjax against the same sweep with kvpress, both on CPU.

kvjax runs the harness twice, in processes of their own that share a compilation cache
on disk: the first starts cold, the second warm. kvpress answers `--torch_items` items
of the same cells, `none` and `random` among them, batch 1, and is scaled to all items.
`KVJAX_TORCH_PYTHON` names its interpreter.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from common import HERE, arguments, report

import kvjax
from kvjax.eval.plan import plan

METHODS = ["snapkv", "h2o", "streaming_llm", "expected_attention", "knorm", "tova"]
KVJAX = """
import sys, kvjax, json
from kvjax.config import decode
from kvjax.eval.config import EvalConfig
from kvjax.eval.harness import run
model, tokenizer = kvjax.load(sys.argv[1], dtype="float32")
run(model, tokenizer, decode(json.loads(sys.argv[2]), EvalConfig), sys.argv[3])
"""


def main() -> int:
    args = arguments(
        __doc__,
        model="kvjax-tiny",
        methods=[*METHODS, "keydiff", "lagkv"],
        keeps=[0.5, 0.25, 0.125],
        items=100,
        batch=50,
        length=512,
        torch_items=10,
    )
    tree = {
        "compressions": args.methods,
        "keeps": args.keeps,
        "tasks": [{"name": "recall"}],
        "lengths": [args.length],
        "items": args.items,
        "batch": args.batch,
        "window": 16,
        "share_passes": True,
    }
    results: dict = {"cells": 1 + (1 + len(args.methods)) * len(args.keeps)}
    with tempfile.TemporaryDirectory() as folder:
        where = pathlib.Path(folder)
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(where / "programs")}
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for name in ("cold", "warm"):
            start = time.perf_counter()
            config = (path_of(args), json.dumps(tree), str(where / name))
            command = [sys.executable, "-c", KVJAX, *config]
            subprocess.run(command, check=True, env=env)
            results[f"kvjax_{name}_s"] = round(time.perf_counter() - start, 1)
        results |= torch_side(args, tree, where, results)
    return report("sweep_vs_kvpress", vars(args), results, seed=1)


def path_of(args) -> str:
    return str(HERE.parent / "configs/model" / args.model)


def torch_side(args, tree: dict, folder: pathlib.Path, results: dict) -> dict:
    from kvjax.config import decode
    from kvjax.eval.config import EvalConfig
    from kvjax.eval.groups import QuestionGroup

    model, tokenizer = kvjax.load(path_of(args), dtype="float32")
    group = plan(model.config, tokenizer, decode(tree, EvalConfig)).groups[0]
    assert isinstance(group, QuestionGroup)
    work = {
        "methods": ["random", *args.methods],
        "keeps": args.keeps,
        "prompts": group.prompts[: args.torch_items],
        "questions": group.questions[: args.torch_items],
        "new": group.reply_room,
        "stops": group.tokenizer.stops(group.task.stop),
    }
    (folder / "work.json").write_text(json.dumps(work))
    python = os.environ.get("KVJAX_TORCH_PYTHON") or sys.executable
    script = str(HERE / "torch_sweep.py")
    command = [python, script, path_of(args), str(folder / "work.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"kvpress_error": done.stderr.strip().splitlines()[-3:]}
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    scaled = theirs["seconds"] * args.items / len(work["prompts"])
    theirs |= {"kvpress_scaled_s": round(scaled, 1)}
    for name in ("cold", "warm"):
        theirs[f"ratio_{name}"] = round(scaled / results[f"kvjax_{name}_s"], 2)
    return theirs


if __name__ == "__main__":
    sys.exit(main())
