"""A real model under RULER: kvjax against kvpress, the same items, prompts, budgets.

Both sides get the same token ids and stop at the same ids. kvpress answers
`--torch_items` items of every cell, one by one as its pipeline does, and its time is
scaled to all items; scores are compared on the items that both answered. Then one text
with one method, process start to last token. `KVJAX_TORCH_PYTHON` names kvpress's
interpreter. The defaults take an hour of two CPU cores; a whole comparison, days:
`--tasks niah_single_2 niah_multikey_1 vt cwe babilong_qa1 --lengths 1024 2048
--items 50 --torch_items 50`.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import HERE, arguments, report
from common_sweep import group_name, ours, planned, theirs

from kvjax.eval.plan import EvalPlan
from kvjax.eval.questions import QuestionGroup
from kvjax.eval.rows import read_rows
from kvjax.models.bundled import model_directory

METHODS = ["snapkv", "h2o", "streaming_llm", "expected_attention", "knorm", "tova"]
TASKS = ["niah_single_2", "niah_multikey_1", "vt"]
TEXT = """
import sys, kvjax, jax.numpy as jnp, json
work = json.load(open(sys.argv[2]))
model, _ = kvjax.load(sys.argv[1], dtype="float32", tokenizer=False)
group = work["groups"][0]
tokens = jnp.asarray([group["prompts"][0] + group["asked"][0]])
c = kvjax.compression("snapkv").with_keep(0.25)
out = kvjax.generate(model, tokens, None, c, max_new_tokens=group["new"][0])
print(out.tokens[0].tolist())
"""


def main() -> int:
    args = arguments(
        __doc__,
        model="smollm2",
        methods=[*METHODS, "keydiff", "lagkv"],
        keeps=[0.5, 0.25, 0.1],
        tasks=TASKS,
        lengths=[1024],
        visibility=["query_agnostic", "query_aware"],
        items=8,
        batch=8,
        torch_items=2,
        repeats=3,
    )
    tree = {
        "model": args.model,
        "compressions": args.methods,
        "keeps": args.keeps,
        "tasks": args.tasks,
        "lengths": args.lengths,
        "visibility": args.visibility,
        "items": args.items,
        "batch": args.batch,
        "share_passes": True,
    }
    path = model_directory(args.model)
    with tempfile.TemporaryDirectory() as folder:
        where = pathlib.Path(folder)
        made = planned(path, tree)
        results: dict[str, Any] = ours(path, tree, where)
        methods = ["random", *args.methods]
        found = theirs(path, made, args.torch_items, methods, args.keeps, where)
        results["scores"] = compared(made, where / "warm", found.pop("cells"))
        results |= found
        for name in ("cold", "warm"):
            ratio = found["kvpress_scaled_s"] / results[f"kvjax_{name}_s"]
            results[f"ratio_{name}"] = round(ratio, 2)
        results["one_text"] = one_text(path, made, where, args.repeats)
    return report("real_vs_kvpress", vars(args), results, seed=1)


def compared(
    made: EvalPlan, run: pathlib.Path, cells: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Scores of both sides on the items that both answered, cell by cell."""
    groups = {
        group_name(one): one for one in made.groups if isinstance(one, QuestionGroup)
    }
    out = []
    for cell in cells:
        group = groups[cell["group"]]
        name = f"{cell['group']}-{cell['compression']}"
        if cell["compression"] != "none":
            name += f"-keep{cell['keep']:g}"
        mine = read_rows(run / "items" / f"{name}.parquet")[: len(cell["replies"])]
        texts = [
            group.task.cut(group.tokenizer.decode(reply)) for reply in cell["replies"]
        ]
        scores = [
            group.task.score(episode.turns[0], text)
            for episode, text in zip(group.episodes, texts, strict=False)
        ]
        gaps = [one["score"] - other for one, other in zip(mine, scores, strict=True)]
        count = len(gaps)
        error = statistics.stdev(gaps) / count**0.5 if count > 1 else 0.0
        out.append(
            {
                **{key: cell[key] for key in ("group", "compression", "keep")},
                "items": count,
                "kvjax": round(100 * statistics.mean(i["score"] for i in mine), 1),
                "kvpress": round(100 * statistics.mean(scores), 1),
                "difference_se": round(100 * error, 1),
                "equal_replies": sum(
                    one["reply"] == text for one, text in zip(mine, texts, strict=True)
                )
                / count,
                "within_two_se": abs(statistics.mean(gaps)) <= 2 * error + 1e-9,
            }
        )
    return out


def one_text(
    path: str, made: EvalPlan, folder: pathlib.Path, repeats: int
) -> dict[str, Any]:
    """Seconds for some 700 tokens and 48 new ones, process start to last token."""
    group = next(one for one in made.groups if isinstance(one, QuestionGroup))
    tokens = list(group.prompts[0][:690])
    one = {"name": "one", "prompts": [tokens], "asked": [tokens[:10]], "new": [48]}
    work = {"methods": ["snapkv"], "keeps": [0.25], "stops": [], "groups": [one]}
    file = folder / "one.json"
    file.write_text(json.dumps(work))
    python = os.environ.get("KVJAX_TORCH_PYTHON") or sys.executable
    env = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found: dict[str, list[float]] = {"kvpress": [], "cold": [], "warm": []}
    for number in range(repeats):
        env["JAX_COMPILATION_CACHE_DIR"] = str(folder / f"one-{number}")
        commands = {
            "kvpress": [python, str(HERE / "torch_one.py"), path, str(file)],
            "cold": [sys.executable, "-c", TEXT, path, str(file)],
            "warm": [sys.executable, "-c", TEXT, path, str(file)],
        }
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
            found[name].append(time.perf_counter() - start)
    times = {f"{name}_s": round(statistics.median(t), 2) for name, t in found.items()}
    return times | {
        "ratio_cold": round(times["cold_s"] / times["kvpress_s"], 2),
        "ratio_warm": round(times["warm_s"] / times["kvpress_s"], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
