"""The compressions of an evaluation: presets with its overrides applied."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.compress.config import Compression
from kvjax.compress.presets import compression, compressions
from kvjax.config import recent_fields
from kvjax.eval.config import EvalConfig
from kvjax.messages import nearest, shown

NONE = "none"
RANDOM = "random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One compression of an evaluation, at any budget.

    Attributes:
        name: what rows call it.
        base: the compression at its own budget.
        overrides: what was changed about the preset.
    """

    name: str
    base: Compression
    overrides: Mapping[str, Any]

    @property
    def overrides_json(self) -> str:
        """The overrides as the rows hold them."""
        return json.dumps(dict(self.overrides), sort_keys=True)

    @property
    def windowed(self) -> bool:
        """Whether `EvalConfig.window` has anything to cut."""
        return bool(recent_fields(self.base))

    def keeps(self, keeps: tuple[float, ...]) -> tuple[float | None, ...]:
        """The budgets to run: one cell without a budget if there is no such knob."""
        return keeps if self.base.has_budget else (None,)

    def at(self, keep: float | None, visibility: str) -> Compression:
        """The compression of one cell."""
        c = dataclasses.replace(self.base, visibility=visibility)
        return c if keep is None else c.with_keep(keep)


def has(c: Compression, path: str) -> bool:
    """Whether the dotted path is a field of `c`."""
    held: Any = c
    for name in path.split("."):
        if not dataclasses.is_dataclass(held) or name not in {
            field.name for field in dataclasses.fields(held)
        }:
            return False
        held = getattr(held, name)
    return True


def methods(config: EvalConfig) -> tuple[Method, ...]:
    """All methods of an evaluation; `none` first, then `random`.

    Raises:
        ValueError: unknown compressions or fields, two of one name.
    """
    listed = {label_of(name): name for name in config.compressions}
    if len(listed) != len(config.compressions):
        names = [label_of(name) for name in config.compressions]
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise ValueError(
            f"two compressions have one name, {shown(twice)}. List it once, or rename "
            "its file."
        )
    for name in config.overrides:
        if name not in listed and name != RANDOM:
            raise ValueError(
                f"`overrides` are for {name!r}, which is not evaluated; expected one "
                f"of {sorted(listed)}.{nearest(name, listed)}"
            )
    order = {NONE: NONE, RANDOM: RANDOM} | listed
    made = tuple(
        _method(label, name, config, listed=label in listed)
        for label, name in order.items()
    )
    for path in config.defaults:
        _check_default(path, [method.base for method in made])
    return made


def _check_default(path: str, here: Sequence[Compression]) -> None:
    """Some compression has the field: one of those here, or else of the presets."""
    everywhere = itertools.chain(here, map(compression, compressions()))
    if not any(has(one, path) for one in everywhere):
        raise ValueError(
            f"`defaults` sets {shown(path)}, a field that no compression has. Say it "
            "as in evict.score.window, or put it under `overrides` of the one that "
            "it is for."
        )


def label_of(name: str) -> str:
    """What rows call a preset or a file."""
    path = pathlib.Path(name)
    return path.stem if path.suffix in (".yaml", ".yml") else name


def _method(label: str, name: str, config: EvalConfig, *, listed: bool) -> Method:
    if label == NONE:
        if config.overrides.get(NONE) or name != NONE:
            raise ValueError(
                "`none` is the reference and cannot be changed; give the compression "
                "another name."
            )
        return Method(name=NONE, base=compression(NONE), overrides={})
    base = compression(name)
    changed: dict[str, Any] = {}
    if config.window is not None:
        for path, size in recent_fields(base).items():
            if size > config.window:
                changed[path] = config.window
    changed |= {path: v for path, v in config.defaults.items() if has(base, path)}
    if listed:
        changed |= config.everywhere
    changed |= config.overrides.get(label, {})
    return Method(name=label, base=compression(name, **changed), overrides=changed)
