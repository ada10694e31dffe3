"""A recipe that trains in a second, and a process that runs it (and may be killed).

    python -m tests.train.tiny_run DIRECTORY FAULT

FAULT: `rename:N` kills the process when all of the checkpoint of step N is written but
its name, `write:N` while it is written, `remove` while an old checkpoint goes, `step:N`
behind step N, when no save is under way.
"""

import dataclasses
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
from kvjax.train.config import (
    CachedConfig,
    DataConfig,
    OptimizerConfig,
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


def losses(directory: pathlib.Path) -> list[tuple[int, float]]:
    """Step and loss of every training line of the log, in their order."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["step"], e["loss"]) for e in events if "width" in e]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_at(fault: str) -> None:
    """Kill this process at a point of a save."""
    kind, _, step = fault.partition(":")
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

    from kvjax.train.done import Progress
    from kvjax.train.run import run

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    where, fault = pathlib.Path(sys.argv[1]), sys.argv[2]
    break_at(fault)

    def told(progress: Progress) -> None:
        if fault == f"step:{progress.step}":
            while not (where / "checkpoints" / f"step_{progress.step - 1}").exists():
                time.sleep(0.01)
            die()

    run(recipe(), where, progress=told)
