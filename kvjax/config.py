"""YAML to frozen dataclasses, strictly; and back.

A mapping decodes into a dataclass; `type: name` picks a registered component where
the field's type is an abstract base. An unknown key, a missing one or a value of the
wrong type is a `ValueError` that names the path and the nearest name that exists.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cattrs
import yaml
from cattrs.gen import make_dict_structure_fn

from kvjax.types import nearest

Registries = Mapping[type, Mapping[str, type]]

_SCALARS = (int, float, str, bool)


def decode[C](tree: Any, cls: type[C], registries: Registries | None = None) -> C:
    """`tree` (plain mappings, lists, scalars) as an instance of `cls`.

    Args:
        tree: what `yaml.safe_load` returns.
        cls: a dataclass, or an abstract base with a registry.
        registries: named components of each abstract base.

    Raises:
        ValueError: unknown or missing key, unknown component, wrong type.
    """
    converter = cattrs.Converter(detailed_validation=False)
    for kind in _SCALARS:
        converter.register_structure_hook(kind, _scalar)
    converter.register_structure_hook_factory(
        dataclasses.is_dataclass, lambda kind: _dataclass_hook(kind, converter)
    )
    for base, known in (registries or {}).items():
        hook = _component_hook(base, known, converter)
        converter.register_structure_hook_func(lambda t, b=base: t is b, hook)
    return converter.structure(tree, cls)


def _scalar(value: Any, kind: type) -> Any:
    """`value` if it already is of `kind` (an int passes as a float)."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and (whole or isinstance(value, float)):
        return float(value)
    if (kind is int and whole) or (kind in (str, bool) and isinstance(value, kind)):
        return value
    raise ValueError(f"expected {kind.__name__}; got {value!r}")


def _dataclass_hook(
    cls: type, converter: cattrs.Converter
) -> Callable[[Any, Any], Any]:
    inner = make_dict_structure_fn(cls, converter)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)

    def structure(tree: Any, _: Any) -> Any:
        if isinstance(tree, cls):
            return tree
        if not isinstance(tree, Mapping):
            raise ValueError(
                f"{cls.__name__} needs a mapping of its fields; got {tree!r}."
            )
        for key in tree:
            if key not in fields:
                raise ValueError(
                    f"{cls.__name__} has no field {key!r}; it has {sorted(fields)}."
                    f"{nearest(str(key), fields)}"
                )
        for name, value in tree.items():
            _check(cls, name, hints[name], value, converter)
        try:
            return inner(tree, cls)
        except KeyError as missing:
            raise ValueError(f"{cls.__name__} needs the field {missing}.") from None

    return structure


def _check(cls: type, name: str, hint: Any, value: Any, converter: cattrs.Converter):
    """Name the field of a scalar that does not fit."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    many = typing.get_origin(hint) in (dict, tuple, list)
    if many and set(typing.get_args(hint)) <= {*_SCALARS, ...}:
        try:
            if isinstance(value, str):  # a sequence of characters, which nobody means
                raise ValueError("expected several values")
            converter.structure(value, hint)
        except (TypeError, ValueError, AttributeError) as wrong:
            raise ValueError(
                f"{cls.__name__}.{name}: {wrong}; got {value!r}."
            ) from None
        return
    scalars = [kind for kind in options if kind in _SCALARS]
    if value is None and type(None) in options:
        return
    if scalars and len(scalars) == len([k for k in options if k is not type(None)]):
        for kind in scalars:
            try:
                _scalar(value, kind)
                return
            except ValueError:
                continue
        wanted = " or ".join(kind.__name__ for kind in scalars)
        raise ValueError(f"{cls.__name__}.{name} must be {wanted}; got {value!r}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _component_hook(base: type, known: Mapping[str, type], converter: cattrs.Converter):
    what = base.__name__.removeprefix("Abstract").lower()

    def structure(tree: Any, _: Any) -> Any:
        if isinstance(tree, base):
            return tree
        if isinstance(tree, str):
            tree = {"type": tree}
        if not isinstance(tree, Mapping) or "type" not in tree:
            raise ValueError(
                f"a {what} needs `type`, one of {sorted(known)}; got {tree!r}."
            )
        name = tree["type"]
        if name not in known:
            raise ValueError(
                f"Unknown {what} {name!r}; expected one of {sorted(known)}."
                f"{nearest(str(name), known)}"
            )
        rest = {key: value for key, value in tree.items() if key != "type"}
        return converter.structure(rest, known[name])

    return structure


def encode(value: Any, registries: Registries | None = None) -> Any:
    """The tree that `decode` turns into `value`; fields at their default left out."""
    if isinstance(value, Mapping):
        return {key: encode(item, registries) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, registries) for item in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    tree: dict[str, Any] = {}
    for known in (registries or {}).values():
        for name, cls in known.items():
            if type(value) is cls:
                tree["type"] = name
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if field.default is dataclasses.MISSING or held != field.default:
            tree[field.name] = encode(held, registries)
    return tree


def override(tree: Any, assignments: Mapping[str, Any]) -> Any:
    """A copy of `tree` with dotted paths set, missing levels created.

    Setting one of `keep`, `slots` and `bytes` of a budget clears the other two.
    Entries of lists go by their number: `stages.0.steps`.

    Raises:
        ValueError: a list has no such entry.
    """
    for path, value in assignments.items():
        tree = _set(tree, path.split("."), value)
    return tree


def _set(tree: Any, path: Sequence[str], value: Any) -> Any:
    head, *rest = path
    if isinstance(tree, list):
        if not head.isdecimal() or int(head) >= len(tree):
            raise ValueError(
                f"a list is indexed by 0 .. {len(tree) - 1}; got {'.'.join(path)!r}."
            )
        entry = tree[int(head)]
        changed = _set(entry, rest, value) if rest else value
        return [changed if i == int(head) else old for i, old in enumerate(tree)]
    if isinstance(tree, str):  # a component given by its name alone
        tree = {"type": tree}
    node = dict(tree or {})
    budget = ("keep", "slots", "bytes")
    if not rest and head in budget:
        for other in budget:
            if other in node:
                node[other] = None
    node[head] = _set(node.get(head), rest, value) if rest else value
    return node


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", ...]` as `{"a.b": 1}`; values are YAML.

    Raises:
        ValueError: an entry without `=` or with an empty path.
    """
    parsed = {}
    for text in assignments:
        path, sign, value = text.partition("=")
        if not sign or not all(path.split(".")):
            raise ValueError(f"expected `dotted.path=value`; got {text!r}.")
        parsed[path] = yaml.safe_load(value)
    return parsed


def positive_int(name: str, value: int, least: int = 1) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}; got {value!r}.")


def sized[N](default: N, *, short: float | int, recent: bool = False) -> N:
    """A field of a component that goes with the lengths of real prompts.

    Args:
        default: the field's.
        short: what does for prompts of about a hundred tokens.
        recent: whether it is the number of newest tokens that a method spares or asks,
            which an evaluation on short prompts may cut.
    """
    metadata = {"short": short, "recent": recent}
    return dataclasses.field(default=default, metadata=metadata)  # type: ignore


def shortened[C](component: C) -> C:
    """A component, with all that it is made of, as short prompts need it."""
    if isinstance(component, tuple):
        return type(component)(map(shortened, component))
    if not dataclasses.is_dataclass(component) or isinstance(component, type):
        return component
    fields = {}
    for field in dataclasses.fields(component):
        held, short = getattr(component, field.name), field.metadata.get("short")
        if short is not None and held is not None:
            held = type(held)(min(held, short))
        fields[field.name] = shortened(held)
    return dataclasses.replace(component, **fields)


def recent_fields(component: Any, path: str = "") -> dict[str, int]:
    """What `sized` calls recent in a component, by dotted paths."""
    found: dict[str, int] = {}
    if isinstance(component, tuple):
        for number, one in enumerate(component):
            found |= recent_fields(one, f"{path}{number}.")
    if not dataclasses.is_dataclass(component):
        return found
    for field in dataclasses.fields(component):
        held, name = getattr(component, field.name), f"{path}{field.name}"
        if field.metadata.get("recent"):
            found[name] = held
        found |= recent_fields(held, f"{name}.")
    return found
