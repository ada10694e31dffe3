"""YAML to frozen dataclasses, strictly; and back.

A mapping decodes into a dataclass; `type: name` picks a registered component where
the field's type is an abstract base. An unknown key, a missing one or a value of the
wrong type is a `ValueError` that names the path and the nearest name that exists.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.fields import fit, hints_of, inner, quoted, refuse
from kvjax.files import parse_yaml
from kvjax.messages import nearest, shown

Registries = Mapping[type, Mapping[str, type]]


def decode[C](
    tree: Any, cls: type[C], registries: Registries | None = None, where: str = ""
) -> C:
    """`tree` (plain mappings, lists, scalars) as an instance of `cls`.

    Args:
        tree: what `kvjax.files.read_yaml` returns.
        cls: a dataclass, or an abstract base with a registry.
        registries: named components of each abstract base.
        where: dotted path of `tree`, for messages.

    Raises:
        ValueError: unknown or missing key, unknown component, wrong type, out of
            range; names the path.
    """
    known = registries or {}

    def build(tree: Any, kind: Any, where: str) -> Any:
        if kind in known:
            return build(*_component(tree, kind, known[kind], where), where)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return refuse(tree, kind, where)
        if not isinstance(tree, Mapping):
            raise ValueError(
                f"{quoted(where or kind.__name__)} must be a mapping of the fields of "
                f"{kind.__name__}; got {shown(tree)}."
            )
        _check_names(kind, tree, where)
        hints = hints_of(kind)
        fields = {
            name: fit(value, hints[name], inner(where, name), build)
            for name, value in tree.items()
        }
        try:
            return kind(**fields)
        except ValueError as wrong:
            raise ValueError(
                f"{quoted(where)}: {wrong}" if where else str(wrong)
            ) from None

    return fit(tree, cls, where, build)


def _check_names(cls: type, tree: Mapping[Any, Any], where: str) -> None:
    """Every key is a field of the dataclass, and none that has no default is missing.

    Raises:
        ValueError: names the nearest field.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    at = f"{quoted(where)}: " if where else ""
    for key in tree:
        if key not in fields:
            raise ValueError(
                f"{at}{cls.__name__} has no field {shown(key)}; it has "
                f"{sorted(fields)}.{nearest(key, fields)}"
            )
    for name, field in fields.items():
        free = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in tree and not free:
            raise ValueError(f"{at}{cls.__name__} needs the field {name!r}.")


def _component(
    tree: Any, base: type, known: Mapping[str, type], where: str
) -> tuple[Mapping[Any, Any], type]:
    """The fields of a component and its class, from `type` or from its name alone."""
    what = base.__name__.removeprefix("Abstract").lower()
    at = f"{quoted(where)}: " if where else ""
    if isinstance(tree, str):
        tree = {"type": tree}
    if not isinstance(tree, Mapping) or "type" not in tree:
        raise ValueError(
            f"{at}a {what} needs `type`, one of {sorted(known)}; got {shown(tree)}."
        )
    name = tree["type"]
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{at}Unknown {what} {shown(name)}; expected one of {sorted(known)}."
            f"{nearest(name, known)}"
        )
    rest = {key: value for key, value in tree.items() if key != "type"}
    return rest, known[name]


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
        if not head.isdecimal() or len(head) > 9 or int(head) >= len(tree):
            raise ValueError(
                f"a list is indexed by 0 .. {len(tree) - 1}; got "
                f"{shown('.'.join(path))}."
            )
        entry = tree[int(head)]
        changed = _set(entry, rest, value) if rest else value
        return [changed if i == int(head) else old for i, old in enumerate(tree)]
    if isinstance(tree, str):  # a component given by its name alone
        tree = {"type": tree}
    if tree is not None and not isinstance(tree, Mapping):
        raise ValueError(
            f"{shown('.'.join(path))} is to be set in {shown(tree)}, which has no "
            "fields. Set what is above it."
        )
    node = dict(tree or {})
    budget = ("keep", "slots", "bytes")
    if not rest and head in budget:
        for other in budget:
            if other in node:
                node[other] = None
    # Keys of files may be numbers: those of `lengths`.
    whole = head.isdecimal() and any(isinstance(key, int) for key in node)
    key = int(head) if whole and len(head) < 20 else head
    node[key] = _set(node.get(key), rest, value) if rest else value
    return node


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", ...]` as `{"a.b": 1}`; values are YAML.

    Raises:
        ValueError: an entry without `=` or with an empty path, or not YAML.
    """
    if isinstance(assignments, str) or not all(isinstance(a, str) for a in assignments):
        raise ValueError(
            f"expected a list of texts, as ['a.b=1']; got {shown(assignments)}."
        )
    parsed = {}
    for text in assignments:
        path, sign, value = text.partition("=")
        if not sign or not all(path.split(".")):
            raise ValueError(f"expected `dotted.path=value`; got {shown(text)}.")
        parsed[path] = parse_yaml(value, f"the value of {shown(path)}")
    return parsed


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
