"""Where arrays of a run are: batches over data x fsdp, weights over fsdp and tensor.

The step is one program for all devices; XLA's partitioner adds the communication.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from kvjax.models.config import DecoderConfig
from kvjax.models.sharding import TRAINING, parameter_axes, spec
from kvjax.train.data.share import WHOLE, RowShare
from kvjax.train.objectives.passes import ROWS
from kvjax.train.recipe import MeshConfig, TrainConfig
from kvjax.train.recipe.output import CACHED_LOSS
from kvjax.train.run.params import Params
from kvjax.train.run.stored import named

AXES = ("data", "fsdp", "tensor")


def check_mesh(config: TrainConfig, model: DecoderConfig, available: int) -> None:
    """The mesh of a recipe has its devices, and what it splits divides.

    Args:
        config: the recipe.
        model: what is trained.
        available: devices of all processes.

    Raises:
        ValueError: it does not; says what was got, what was expected and a remedy.
    """
    mesh = config.mesh
    processes = jax.process_count()
    if mesh.devices > available or (processes > 1 and mesh.devices != available):
        few = "at most" if processes == 1 else "exactly"
        raise ValueError(
            f"`mesh` asks for {_axes_text(mesh)} = {mesh.devices} devices; {processes} "
            f"process(es) have {available}. Their product must be {few} that."
        )
    sizes = {
        "hidden_size": (model.hidden_size, "fsdp"),
        "num_heads": (model.num_heads, "tensor"),
        "num_kv_heads": (model.num_kv_heads, "tensor"),
        "intermediate_size": (model.intermediate_size, "tensor"),
        "vocab_size": (model.vocab_size, "tensor"),
    }
    for name, (size, axis) in sizes.items():
        ways = getattr(mesh, axis)
        if size % ways:
            raise ValueError(
                f"the model's {name} of {size} does not divide by mesh.{axis}={ways}. "
                f"Take a divisor of {size}, and more of `data` for the rest."
            )
    _check_rows(config)


def _check_rows(config: TrainConfig) -> None:
    ways = config.mesh.rows
    for number, stage in enumerate(config.stages):
        for width in stage.lengths:
            rows = stage.rows(width)
            if rows % ways:
                raise ValueError(
                    f"stages[{number}] has {rows} rows of {width} tokens in a step, "
                    f"which data x fsdp = {ways} does not divide. Take a "
                    f"`tokens_per_step` that is a multiple of {ways * width}."
                )
    if config.eval_items % ways:
        raise ValueError(
            f"`eval_items` of {config.eval_items} does not divide by data x fsdp = "
            f"{ways}. Take a multiple."
        )
    if jax.process_count() > 1 and config.cached.items:
        other = config.keep.metric == CACHED_LOSS
        raise ValueError(
            f"`cached.items` is {config.cached.items} in a run of "
            f"{jax.process_count()} processes; the evaluation through the cache runs "
            "in one. Set `cached.items=0`"
            + (" and `keep.metric=answer_loss`" if other else "")
            + ": held-out sets are evaluated with a full cache all the same. Evaluate "
            "the finished model under compression with `kvjax eval`, in one process."
        )


def _axes_text(mesh: MeshConfig) -> str:
    return " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES)


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """The mesh of a recipe, its axes in the order of `AXES`.

    Args:
        config: sizes of the axes.
        devices: to take; None: the first that there are.
    """
    taken = list(jax.devices() if devices is None else devices)[: config.devices]
    shape = (config.data, config.fsdp, config.tensor)
    # Left to the partitioner: the decoder is written for it.
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=taken)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each leaf of a state is, by the name of the parameter it belongs to.

    Moments and gradients are named for their parameter and lie where it lies; what has
    no axis in the table (norms, counts) is everywhere.
    """
    leaves = [
        NamedSharding(mesh, spec(_axes(path, x.ndim), mesh, TRAINING))
        for path, x in named(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _axes(path: str, rank: int) -> tuple[str | None, ...]:
    base, _, last = path.rpartition(".")
    if last in ("lora_a", "lora_b"):  # [in, rank] and [rank, out] of a matrix
        *lead, n_in, n_out = parameter_axes(f"{base}.kernel", rank)
        return (*lead, n_in, None) if last == "lora_a" else (*lead, None, n_out)
    found = parameter_axes(path, rank)
    return found if len(found) == rank else (None,) * rank


def everywhere(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placed[T](tree: T, mesh: Mesh) -> T:
    """`tree` where `shardings` wants it; every process holds the same `tree`."""

    def put(x: Array, sharding: NamedSharding) -> Array:
        if x.sharding == sharding:
            return x
        return jax.device_put(np.asarray(x) if _own(x) else x, sharding)

    return jax.tree.map(put, tree, shardings(tree, mesh))


def gathered(params: Params, mesh: Mesh) -> Params:
    """`params` with whole rows of the embedding on each device, while a pass runs.

    Looked up in a table that is split along the rows, tokens would come out split along
    the width of the model, and all layers would follow.
    """
    wide = {**TRAINING, "embed": None}

    def whole(path: str, x: Array) -> Array:
        if path.rpartition(".")[2] != "embedding":
            return x
        where = NamedSharding(mesh, spec(_axes(path, x.ndim), mesh, wide))
        return jax.lax.with_sharding_constraint(x, where)

    return {path: whole(path, x) for path, x in params.items()}


def _own(x: Array) -> bool:
    return jax.process_count() > 1 and x.is_fully_addressable


def share_of(mesh: Mesh) -> RowShare:
    """What this process makes of every batch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    held = NamedSharding(mesh, ROWS).addressable_devices_indices_map((ways,))
    starts = sorted(
        {(index or (slice(0, ways),))[0].start or 0 for index in held.values()}
    )
    if len(held) == mesh.size:
        return WHOLE
    if starts != list(range(starts[0], starts[-1] + 1)):
        raise ValueError(
            f"process {jax.process_index()} holds parts {starts} of {ways} of the "
            "batch; they must follow one another. Choose mesh axes whose inner ones "
            "fill the devices of a process."
        )
    return RowShare(first=starts[0], last=starts[-1] + 1, ways=ways)


def spread[T](batch: T, mesh: Mesh, share: RowShare = WHOLE) -> T:
    """A batch over the devices of all processes.

    Args:
        batch: the rows of this process's share.
        mesh: of the run.
        share: all of the batch, unless it was made in parts.
    """

    def put(x: Array) -> Array:
        local = np.asarray(x)
        where = NamedSharding(mesh, ROWS) if x.ndim else everywhere(mesh)
        shape = (share.of(len(local)), *local.shape[1:]) if x.ndim else ()
        return jax.make_array_from_process_local_data(where, local, shape)

    return jax.tree.map(put, batch)
