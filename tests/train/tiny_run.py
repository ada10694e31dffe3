"""Recipes that train in seconds, and a process that runs one (and may be killed).

    python -m tests.train.tiny_run DIRECTORY FAULT [RECIPE]

RECIPE: a name of `RECIPES`; `plain` unless it is given. FAULT: `rename:N` kills the
process when all of the checkpoint of step N is written but its name, `write:N` while it
is written, `remove` while an old checkpoint goes, `step:N` behind step N, when no save
is under way, `call:N` at the N-th call to the file system below the directory.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from typing import Any

from kvjax.models.config import DecoderConfig
from kvjax.rope import Rope
from kvjax.train.recipe import (
    CachedConfig,
    CompressionChoice,
    DataConfig,
    LoRAConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    Source,
    Stage,
    TrainConfig,
)


def recipe(**fields: Any) -> TrainConfig:
    """Six steps, a checkpoint every second; nothing is evaluated."""
    base = TrainConfig(
        model=DecoderConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            rope=Rope(head_dim=8),
            tie_embeddings=True,
        ),
        data=DataConfig(sources=(Source(task="recall"),)),
        stages=(Stage(steps=6, lengths={64: 1.0}, tokens_per_step=128),),
        optimizer=OptimizerConfig(name="adamw", warmup=1, decay=1),
        log_every=1,
        eval_every=6,
        save_every=2,
        eval_items=1,
        cached=CachedConfig(items=0),
    )
    return dataclasses.replace(base, **fields)


SNAPKV = CompressionChoice(
    compression="snapkv", keeps=(0.5,), fields={"evict.score.window": 8}
)
KIVI = CompressionChoice(
    compression="kivi_2bit",
    fields={"store.residual": 8, "store.keys.group": 8, "store.values.group": 8},
)


def compressed(*others: CompressionChoice, **fields: Any) -> TrainConfig:
    """Sampled compressions whose choice of tokens has a gradient, and Muon.

    Two batches make an update and a checkpoint is behind every third, so the first one
    holds half of an update. One layer, for the sake of compile time.
    """
    base = recipe()
    assert base.model is not None
    choices = (CompressionChoice(compression="int8"), SNAPKV, *others)
    given = {
        "model": dataclasses.replace(base.model, num_layers=1),
        "sampling": SamplingConfig(choices=choices, choice_gradient=0.1),
        "optimizer": OptimizerConfig(name="muon", warmup=1, decay=1, accumulate=2),
        "save_every": 3,
    }
    return dataclasses.replace(base, **given | fields)


def low_rank() -> TrainConfig:
    """The same with LoRA, and a teacher, of which no checkpoint holds anything."""
    lora, objective = LoRAConfig(rank=2), ObjectiveConfig(distill=0.5)
    return compressed(KIVI, model=recipe().model, lora=lora, objective=objective)


RECIPES = {"plain": recipe, "compressed": compressed, "low_rank": low_rank}


def losses(directory: pathlib.Path) -> list[tuple[int, float]]:
    """Step and loss of every training line of the log, in their order."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["step"], e["loss"]) for e in events if "width" in e]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_at(fault: str, where: pathlib.Path) -> None:
    """Kill this process at a point of a save, or at a call to the file system."""
    kind, _, step = fault.partition(":")
    if kind == "call":
        left = itertools.count(int(step), -1)

        def count(event: str, args: tuple[Any, ...]) -> None:
            named = event in ("open", "os.rename", "os.mkdir", "os.remove")
            if named and str(args[0]).startswith(str(where)) and next(left) == 0:
                die()

        sys.addaudithook(count)
        return
    if kind == "remove":
        whole = shutil.rmtree

        def half(path: Any, *args: Any, **kwargs: Any) -> None:
            if "step_" in str(path):
                (pathlib.Path(path) / "_CHECKPOINT_METADATA").unlink()
                die()
            whole(path, *args, **kwargs)

        shutil.rmtree = half
        return

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if kind == "rename" and event == "os.rename":
            if str(args[1]).endswith(f"step_{step}"):
                die()
        if kind == "write" and event == "open" and f"step_{step}." in str(args[0]):
            die()

    sys.addaudithook(audit)


if __name__ == "__main__":
    import jax

    from kvjax.train.run import run
    from kvjax.train.run.progress import StepProgress

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    where, fault = pathlib.Path(sys.argv[1]), sys.argv[2]
    name = sys.argv[3] if len(sys.argv) > 3 else "plain"
    break_at(fault, where)

    def told(progress: StepProgress) -> None:
        if fault == f"step:{progress.step}":
            while not (where / "checkpoints" / f"step_{progress.step - 1}").exists():
                time.sleep(0.01)
            die()

    run(RECIPES[name](), where, progress=told)
