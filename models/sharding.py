"""One table from logical axes to mesh axes, for parameters and for caches."""

from collections.abc import Mapping
from types import MappingProxyType

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvjax.axes import MeshAxes, Rules, names_of, ways
from kvjax.messages import nearest, shown

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
        "shared_slots": (None, None),
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
    return PartitionSpec(*(x if set(names_of(x)) <= here else None for x in placed))


def automatic(mesh: Mesh) -> Mesh:
    """`mesh` with every axis left to the partitioner.

    `jax.make_mesh` makes explicit axes, under which each product over a sharded axis
    would need its own annotation; the decoder is written for the partitioner.

    Raises:
        ValueError: it is no mesh of devices.
    """
    if not isinstance(mesh, Mesh) or not mesh.devices.size:
        raise ValueError(
            f"`mesh` must be a jax.sharding.Mesh of devices; got {shown(mesh)}. "
            '`jax.make_mesh((2, 4), ("data", "model"))` makes one.'
        )
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
        ValueError: an axis does not divide by the mesh axis it is split over, or two
            are split over the same.
    """
    axes = parameter_axes(path, len(shape))
    placed = spec(axes, mesh, rules)
    _check_once(path, axes, placed)
    for size, logical, name in zip(shape, axes, placed, strict=True):
        check_divides(logical or path, size, name, mesh)
    return NamedSharding(mesh, placed)


def check_rules(mesh: Mesh, rules: Rules) -> None:
    """Rules are about axes that there are, and split no parameter twice by one.

    Raises:
        ValueError: they are not; names the nearest.
    """
    if not isinstance(rules, Mapping):
        raise ValueError(
            "`rules` must map logical axes to axes of the mesh; got "
            f"{shown(rules)}. `models.sharding.RULES` does."
        )
    for logical, axes in rules.items():
        if logical not in RULES:
            raise ValueError(
                f"`rules` has no logical axis {shown(logical)}; there are "
                f"{sorted(RULES)}.{nearest(logical, RULES)}"
            )
        _check_axes(logical, axes, mesh)
    for path, axes in _PARAMETERS.items():
        if len(set(axes)) == len(axes):  # bases are square, and few models have them
            _check_once(path, axes, spec(axes, mesh, rules))


def _check_axes(logical: str, axes: MeshAxes, mesh: Mesh) -> None:
    """One rule names axes of the mesh, or is that of a table, which may name others."""
    known = mesh.axis_names
    if not (axes is None or isinstance(axes, str | tuple)):
        raise ValueError(
            f"`rules[{logical!r}]` must be the name of a mesh axis, several as a "
            f"tuple, or None; got {shown(axes)}."
        )
    for axis in () if axes in _TABLE[logical] else names_of(axes):
        if axis not in known:
            raise ValueError(
                f"`rules[{logical!r}]` names {shown(axis)}, which is no axis of the "
                f"mesh; it has {list(known)}.{nearest(axis, map(str, known))}"
            )


def _check_once(path: str, axes: tuple[str | None, ...], placed: PartitionSpec) -> None:
    """No mesh axis splits one parameter twice."""
    seen: dict[str, str | None] = {}
    for logical, names in zip(axes, placed, strict=True):
        for name in names_of(names):
            if name in seen:
                raise ValueError(
                    f"`rules` split {path} by mesh axis {name!r} twice: as "
                    f"{seen[name]!r} and as {logical!r}. Give one of them None or "
                    "another axis."
                )
            seen[name] = logical


def check_divides(logical: str, size: int, name: MeshAxes, mesh: Mesh) -> None:
    """Raise unless `size` divides over mesh axis `name` (None: not split)."""
    count = ways(name, mesh)
    if size % count:
        possible = [n for n in range(1, size + 1) if size % n == 0]
        other = ""
        if logical == "kv_heads":
            rules = f"{{'kv_heads': None, 'slots': {name!r}}}"
            other = f" `rules=RULES | {rules}` splits the slots of caches instead."
        raise ValueError(
            f"{logical!r} of size {size} does not divide over mesh axis {name!r} of "
            f"size {count}. Use a smaller mesh axis, of {_few(possible)}, or pass "
            f"`rules=RULES | {{{logical!r}: None}}` to replicate it.{other}"
        )


def _few(sizes: list[int]) -> str:
    """The smallest of some sizes in words."""
    if len(sizes) < 2:
        return "1"
    kept = sizes[:8]
    return f"{', '.join(map(str, kept[:-1]))} or {kept[-1]}"


def check_heads(
    num_heads: int,
    num_kv_heads: int,
    mesh: Mesh,
    rules: Rules = RULES,
) -> None:
    """Raise unless the rules are some, and whole heads fall on each device."""
    check_rules(mesh, rules)
    for name, count in (("heads", num_heads), ("kv_heads", num_kv_heads)):
        (placed,) = spec((name,), mesh, rules)
        check_divides(name, count, placed, mesh)


def place(array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A host array on its devices, after the transfer is done."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(array))
    out = jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])
    return jax.block_until_ready(out)
