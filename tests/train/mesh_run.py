"""Small runs on meshes of virtual devices, or as one of several processes.

    python -m tests.train.mesh_run DIRECTORY KIND/MESH...

KIND is a key of `KINDS`, MESH is `data,fsdp,tensor`; each run goes to a folder of that
name, with `held.json`: the share of its state's bytes that the fullest device holds,
and `heard.json`: what was replied through the cache, the partitions that its ops saw,
the bytes of the frozen weights, and of all live arrays of their shapes.
A model in DIRECTORY/start is where training starts from, instead of fresh weights.
`DEVICES` in the environment is how many devices a process has; with the variables of
`kvjax.train.run.processes` it is one of several.
"""

import collections
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from kvjax.models.config import Evictor, Projection
from kvjax.train.recipe import (
    CachedConfig,
    ChunksConfig,
    CompressionChoice,
    DMSConfig,
    DuoConfig,
    LoRAConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    Stage,
    SurrogateConfig,
    TrainConfig,
)
from kvjax.types import nbytes
from tests.train.tiny_run import recipe

HALF = CompressionChoice(
    compression="snapkv_kivi",
    keeps=(0.5,),
    fields={"evict.score.window": 4, "store.residual": 0},
)
PLAIN: dict[str, Any] = {}
CACHED: dict[str, Any] = {"cached": CachedConfig(items=2, choices=(HALF,))}
SAMPLED: dict[str, Any] = {
    "sampling": SamplingConfig(
        visible=0.5,
        choice_gradient=0.5,
        choices=(HALF, CompressionChoice(compression="none")),
    ),
    "objective": ObjectiveConfig(distill=0.5),
    "loop_layers": True,
}
FAST = OptimizerConfig(
    name="adamw", learning_rate=0.01, warmup=0, decay=1, weight_decay=0.0
)
ALONE = ObjectiveConfig(next_token=0.0)
LOW_RANK: dict[str, Any] = {"lora": LoRAConfig(rank=2), "optimizer": FAST}
FOLLOWED: dict[str, Any] = {**LOW_RANK, "objective": ObjectiveConfig(distill=0.5)}
DMS: dict[str, Any] = {
    "evictor": Evictor(gain=10.0, offset=2.0),
    "dms": DMSConfig(window=4, ramp=4),
    "objective": ObjectiveConfig(distill=0.5),
    "optimizer": FAST,
}
DUO: dict[str, Any] = {
    "duo": DuoConfig(sink=2, recent=5, weight=0.5),
    "objective": ALONE,
    "optimizer": dataclasses.replace(FAST, learning_rate=0.1),
}
SURROGATE: dict[str, Any] = {
    "evictor": Evictor(kind="mlp", hidden=16),
    "surrogate": SurrogateConfig(),
    "objective": ALONE,
    "trainable": ("*.retention.*",),
    "optimizer": FAST,
}
PROJECTION: dict[str, Any] = {
    "projection": Projection(),
    "sampling": SamplingConfig(
        choices=(CompressionChoice(compression="matryoshka", keeps=(0.5, 0.25)),)
    ),
    "objective": ObjectiveConfig(next_token=0.0, distill=1.0),
    "optimizer": FAST,
}
CHUNKED: dict[str, Any] = {
    "chunks": ChunksConfig(size=12),
    "sampling": SamplingConfig(
        choices=(
            CompressionChoice(compression="none"),
            CompressionChoice(
                compression="snapkv",
                fields={"evict.score.window": 4, "evict.budget.slots": 16},
            ),
        )
    ),
    "objective": ObjectiveConfig(distill=0.5),
    "lora": LoRAConfig(rank=2),
    "optimizer": FAST,
    "remat": True,
    "loop_layers": True,
}
LEARNED = {
    "dms": DMS,
    "duo": DUO,
    "surrogate": SURROGATE,
    "projection": PROJECTION,
}
KINDS = {
    "plain": PLAIN,
    "cached": CACHED,
    "sampled": SAMPLED,
    "lora": LOW_RANK,
    "followed": FOLLOWED,
    "chunked": CHUNKED,
    **LEARNED,
}


def spread_recipe(kind: str, mesh: MeshConfig, **fields: Any) -> TrainConfig:
    """Four rows a step and heads that two devices can share."""
    base = recipe(
        stages=(Stage(steps=6, lengths={64: 1.0}, tokens_per_step=256),),
        eval_items=4,
        mesh=mesh,
        **KINDS[kind],
    )
    assert base.model is not None
    shape = dataclasses.replace(
        base.model, num_heads=4, num_kv_heads=2, num_layers=1, init_std=0.2
    )
    if base.loop_layers:
        shape = dataclasses.replace(shape, num_layers=3)
    return dataclasses.replace(base, **{"model": shape, **fields})


def mesh_of(text: str) -> MeshConfig:
    data, fsdp, tensor = map(int, text.split(","))
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def fullest(state: Any) -> float:
    """Bytes of `state` on the device that holds most, over its own bytes."""
    import jax

    held = collections.Counter()
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@contextlib.contextmanager
def listening() -> Iterator[dict[str, list[Any]]]:
    """What `heard.json` holds, once a run is over."""
    import jax

    from kvjax.pallas_kernels import dispatch
    from kvjax.train.held_out import cached
    from kvjax.train.run import runner

    heard: dict[str, list[Any]] = {"replies": [], "partitions": [], "frozen": []}
    reply, count, train = cached.cached_replies, dispatch.partitions, runner.train

    def trained(weights: Any, *args: Any, **kwargs: Any) -> Any:
        gc.collect()
        shapes = {x.shape for x in weights.fixed.values()}
        alive = [x.nbytes for x in jax.live_arrays() if x.shape in shapes]
        heard["frozen"] = [nbytes(weights.fixed), sum(alive)]
        return train(weights, *args, **kwargs)

    def counted() -> int:
        heard["partitions"].append(count())
        return heard["partitions"][-1]

    def replied(*args: Any) -> list[str]:
        with mock.patch.object(dispatch, "partitions", counted):
            heard["replies"].append(reply(*args))
        return heard["replies"][-1]

    with (
        mock.patch.object(cached, "cached_replies", replied),
        mock.patch.object(runner, "train", trained),
    ):
        yield heard


if __name__ == "__main__":
    import jax

    from kvjax.train.run import run
    from kvjax.train.run.processes import VARIABLES, join

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
    if VARIABLES[0] in os.environ:
        join()
    where = pathlib.Path(sys.argv[1])
    start, fields = where / "start", {}
    if start.exists():
        fields = {"model": None, "init": str(start)}
    for name in sys.argv[2:]:
        kind, mesh = name.split("/")
        with listening() as heard:
            state = run(spread_recipe(kind, mesh_of(mesh), **fields), where / name)
        if jax.process_index() == 0:
            (where / name / "held.json").write_text(json.dumps(fullest(state)))
            (where / name / "heard.json").write_text(json.dumps(heard))
