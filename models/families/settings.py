"""A `config.json` that is asked by name, type and range."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvjax.fields import fit
from kvjax.messages import nearest, shown

_NEEDED: Any = object()
_NONE: Mapping[str, Any] = MappingProxyType({})


class Settings:
    """The settings of a file over those that a family assumes.

    A null stands for what is left out, but takes away what the family assumes: there
    is no window where `sliding_window` is null.

    Args:
        raw: the parsed file, or a mapping in it.
        defaults: what holds for keys that `raw` leaves out.
        where: dotted path of `raw` in its file, for messages.
    """

    def __init__(
        self,
        raw: Any,
        defaults: Mapping[str, Any] = _NONE,
        where: str = "",
    ):
        if not isinstance(raw, Mapping):
            raise ValueError(f"`{where}` must be a mapping; got {shown(raw)}.")
        self.values = {**defaults, **raw}
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, hint: Any, default: Any = _NEEDED) -> Any:
        """The setting, as `hint` has it (see `kvjax.fields`).

        Raises:
            ValueError: another type or out of range; missing where there is no
                `default`. The nearest key is named.
        """
        value = self.values.get(name)
        if value is not None:
            return fit(value, hint, f"{self.where}.{name}" if self.where else name)
        if default is _NEEDED:
            at = f"`{self.where}` in it" if self.where else "It"
            if name in self.values:
                raise ValueError(
                    f"{at} needs `{name}`, which is missing: it is null. Set it, or "
                    "take the null out where there is a default."
                )
            raise ValueError(
                f"{at} needs `{name}`, which is missing.{nearest(name, self.values)}"
            )
        return default

    def inside(self, name: str) -> "Settings":
        """The mapping `name`; an empty one where it is missing."""
        where = f"{self.where}.{name}" if self.where else name
        value = self.values.get(name)
        return Settings({} if value is None else value, where=where)
