"""One table from logical axes to mesh axes, for parameters and for caches."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]
"""Logical axis to the axis, or axes, of a mesh that split it; None: whole."""

# Each logical axis on a mesh that decodes (data, model), and on one that trains (data,
# fsdp, tensor).
_TABLE: Mapping[str, tuple[MeshAxes, MeshAxes]] = MappingProxyType(
    {
        "batch": ("data", ("data", "fsdp")),
        "heads": ("model", "tensor"),
        "kv_heads": ("model", "tensor"),
        "mlp": ("model", "tensor"),
        "vocab": ("model", "tensor"),
        "slots": (None, None),
        "embed": (None, "fsdp"),
        "head_dim": (None, None),
        "layers": (None, None),
    }
)

RULES: Rules = MappingProxyType({axis: to for axis, (to, _) in _TABLE.items()})
"""Those of a mesh that decodes; a mesh without that axis replicates."""

TRAINING: Rules = MappingProxyType({axis: to for axis, (_, to) in _TABLE.items()})
"""Those of a mesh that trains."""

# Parameter path suffix to logical axes. `[in, out]` kernels: q, k, v, gate and up are
# split by columns, o and down by rows, so one layer needs two reductions.
_PARAMETERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embedding": ("vocab", "embed"),
        "head.kernel": ("embed", "vocab"),
        "attention.q.kernel": ("embed", "heads"),
        "attention.k.kernel": ("embed", "kv_heads"),
        "attention.v.kernel": ("embed", "kv_heads"),
        "attention.o.kernel": ("heads", "embed"),
        "attention.q.bias": ("heads",),
        "attention.k.bias": ("kv_heads",),
        "attention.v.bias": ("kv_heads",),
        "attention.key_basis": ("kv_heads", "head_dim", "head_dim"),
        "attention.value_basis": ("kv_heads", "head_dim", "head_dim"),
        "mlp.gate.kernel": ("embed", "mlp"),
        "mlp.up.kernel": ("embed", "mlp"),
        "mlp.down.kernel": ("mlp", "embed"),
        "mlp.gate.bias": ("mlp",),
        "mlp.up.bias": ("mlp",),
    }
)


def parameter_axes(path: str, rank: int) -> tuple[str | None, ...]:
    """Logical axes of a decoder parameter, by its dotted path; norms replicate."""
    lead = ("layers",) if "layers" in path.split(".") else ()
    for suffix, axes in _PARAMETERS.items():
        if path == suffix or path.endswith("." + suffix):
            return (*lead, *axes)
    return (None,) * rank


def spec(
    axes: tuple[str | None, ...],
    mesh: Mesh,
    rules: Rules = RULES,
) -> PartitionSpec:
    """`PartitionSpec` of logical `axes` on `mesh`."""
    placed = [rules.get(axis) if axis else None for axis in axes]
    here = set(mesh.axis_names)
    return PartitionSpec(*(x if set(_names(x)) <= here else None for x in placed))


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def automatic(mesh: Mesh) -> Mesh:
    """`mesh` with every axis left to the partitioner.

    `jax.make_mesh` makes explicit axes, under which each product over a sharded axis
    would need its own annotation; the decoder is written for the partitioner.
    """
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def parameter_sharding(
    path: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: Rules = RULES,
) -> NamedSharding:
    """Sharding of one decoder parameter.

    Raises:
        ValueError: an axis does not divide by the mesh axis it is split over.
    """
    axes = parameter_axes(path, len(shape))
    placed = spec(axes, mesh, rules)
    for size, logical, name in zip(shape, axes, placed, strict=True):
        check_divides(logical or path, size, name, mesh)
    return NamedSharding(mesh, placed)


def check_divides(logical: str, size: int, name: MeshAxes, mesh: Mesh) -> None:
    """Raise unless `size` divides over mesh axis `name` (None: not split)."""
    ways = math.prod(mesh.shape[axis] for axis in _names(name))
    if size % ways:
        raise ValueError(
            f"{logical!r} of size {size} does not divide over mesh axis {name!r} of "
            f"size {ways}. Use a smaller mesh axis, or pass "
            f"`rules=RULES | {{{logical!r}: None}}` to replicate it."
        )


def check_heads(
    num_heads: int,
    num_kv_heads: int,
    mesh: Mesh,
    rules: Rules = RULES,
) -> None:
    """Raise unless whole heads fall on each device."""
    for name, count in (("heads", num_heads), ("kv_heads", num_kv_heads)):
        (placed,) = spec((name,), mesh, rules)
        check_divides(name, count, placed, mesh)


def place(array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A host array on its devices, after the transfer is done."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(array))
    out = jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])
    return jax.block_until_ready(out)
