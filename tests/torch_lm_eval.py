# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""Runs tasks with the `hf` model of lm-evaluation-harness, on the CPU in float32.

    python tests/torch_lm_eval.py OUT.json MODEL TASKS_FOLDER NAMES [LIMIT]

OUT.json has for each task its metrics and what the model answered:

    {"results": {TASK: {METRIC: value}}, "answers": {TASK: [[answer, ...] per item]}}
"""

import json
import sys
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main(out: str, model: str, folder: str, names: str, limit: str = "") -> None:
    hf: Any = HFLM
    evaluate: Any = lm_eval.simple_evaluate
    lm = hf(pretrained=model, dtype="float32", device="cpu", batch_size=4)
    found = evaluate(
        model=lm,
        tasks=names.split(","),
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        limit=int(limit) if limit else None,
        bootstrap_iters=0,
    )
    answers = {
        task: [[answer for (answer,) in one["resps"]] for one in samples]
        for task, samples in found["samples"].items()
    }
    with open(out, "w", encoding="utf-8") as file:
        text = json.dumps({"results": found["results"], "answers": answers})
        file.write(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
