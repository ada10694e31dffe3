"""Presets: published methods as short YAML files, decoded strictly."""

import importlib.resources
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import yaml

from kvjax.budgets import BUDGETS, AbstractBudget
from kvjax.codecs import CODECS, AbstractCodec
from kvjax.compress.config import Compression
from kvjax.config import decode, encode, override
from kvjax.files import MOST_YAML, read_text, yaml_mapping
from kvjax.merges import MERGES, AbstractMerge
from kvjax.messages import nearest, shown
from kvjax.prefills import PREFILLS, AbstractPrefill
from kvjax.reads import READS, AbstractRead
from kvjax.schedules import SCHEDULES, AbstractSchedule
from kvjax.scorers import SCORERS, AbstractScorer
from kvjax.units import UNITS, AbstractUnit

COMPONENTS: Mapping[type, Mapping[str, type]] = MappingProxyType(
    {
        AbstractScorer: SCORERS,
        AbstractUnit: UNITS,
        AbstractBudget: BUDGETS,
        AbstractMerge: MERGES,
        AbstractCodec: CODECS,
        AbstractRead: READS,
        AbstractPrefill: PREFILLS,
        AbstractSchedule: SCHEDULES,
    }
)
"""Every registered component, by the abstract base of the field it fills."""


def _folder():
    return importlib.resources.files("kvjax") / "configs" / "compression"


def compressions() -> tuple[str, ...]:
    """Names of the presets, sorted."""
    names = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml")))


def compression(name: str | pathlib.Path, /, **overrides: Any) -> Compression:
    """A preset, or a YAML file of yours, with some fields changed.

    Args:
        name: a preset (see `compressions()`) or a path to a `.yaml` file.
        overrides: dotted paths to values, as in
            `compression("snapkv", **{"evict.budget.keep": 0.25})`. Setting one of
            `keep`, `slots` and `bytes` of a budget clears the other two.

    Raises:
        ValueError: an unknown preset, component or field (the nearest is named), a
            value out of range, or fields that exclude each other.

    Example:
        >>> compression("snapkv", **{"evict.budget.slots": 128}).evict.budget.slots
        128
    """
    if not isinstance(name, str | pathlib.PurePath):
        raise ValueError(
            "A compression is the name of a preset or a path to a .yaml file; got "
            f"{shown(name)}."
        )
    tree = yaml_mapping(_read(name), f"compression {shown(str(name))}")
    try:
        return decode(override(tree, overrides), Compression, COMPONENTS)
    except ValueError as wrong:
        raise ValueError(f"compression {shown(str(name))}: {wrong}") from None


def _read(name: str | pathlib.Path) -> str:
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read_text(path, MOST_YAML)
    known = compressions()
    if str(name) not in known:
        raise ValueError(
            f"Unknown compression {shown(str(name))}; expected one of {list(known)} or "
            f"a path to a .yaml file.{nearest(str(name), known)}"
        )
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def describe(name: str) -> str:
    """What a preset is: the comment at the head of its file."""
    lines = []
    for line in _read(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)


def canonical(c: Compression) -> str:
    """`c` as YAML with defaults left out; equal text means equal compression."""
    return yaml.safe_dump(encode(c, COMPONENTS), sort_keys=True)
