"""What a field may hold, said once: in its annotation.

    window: Annotated[int, Range(1)] = 64

`Checked` holds constructors to it, `kvjax.config.decode` what files say, and
`kvjax.models.families` what a `config.json` says. Without any `Range`, too, a number is
at most 1e15, an integer fits into 32 bits, and no boolean is a number.
"""

import contextlib
import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from kvjax.messages import nearest, shown
from kvjax.plaintext import check_text

Number = int | float


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number.

    Attributes:
        least, most: it may be these.
        above, below: it may not be these.
        hint: what to do, for messages.
    """

    least: Number | None = None
    most: Number | None = None
    above: Number | None = None
    below: Number | None = None
    hint: str = ""

    def holds(self, value: Number) -> bool:
        """Whether the number is inside."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            left = "[" if self.above is None else "("
            right = "]" if self.below is None else ")"
            return f" in {left}{low}, {high}{right}"
        if low is not None:
            return f" {'>=' if self.above is None else '>'} {low}"
        return "" if high is None else f" {'<=' if self.below is None else '<'} {high}"


class OneOf:
    """The only values that a field may hold."""

    def __init__(self, *known: Any, hint: str = ""):
        self.known, self.hint = known, hint

    def pick(self, value: Any, where: str) -> Any:
        """The value, if it is known."""
        for one in self.known:
            if type(value) is type(one) and value == one:
                return one
        hint = self.hint and f" {self.hint}"
        if isinstance(value, str):
            hint += nearest(value, map(str, self.known))
        raise ValueError(
            f"{quoted(where)} must be one of {list(self.known)}; got {shown(value)}."
            f"{hint}"
        )


Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Fraction = Annotated[float, Range(above=0, most=1)]
Share = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(1e-3, 1e6)]
PositiveReal = Annotated[float, Range(above=0)]
Amount = Annotated[float, Range(0)]
Bytes = Annotated[int, Range(1, 2**60)]
Size = Annotated[int, Range(1, 2**16)]
Kernel = Annotated[int, Range(1, 1023)]
Token = Annotated[
    int,
    Range(0, hint="It is an id of the model's tokenizer, without special tokens."),
]
Kept = Annotated[
    float,
    Range(
        above=0,
        most=1,
        hint="It is the fraction kept: with kvpress' compression_ratio, which is the "
        "fraction removed, keep = 1 - ratio.",
    ),
]

Build = Callable[[Any, Any, str], Any]
"""`(tree, class, where) -> instance` of a class that is no scalar."""

_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
}
_LARGEST = 1e15
"""Of numbers: what is computed with their squares stays finite in float32."""
_INT32 = Range(-(2**31), 2**31 - 1)


def refuse(tree: Any, kind: Any, where: str) -> Any:
    """What builds instances where there are no files: nobody does."""
    raise ValueError(f"{quoted(where)} must be a {kind.__name__}; got {shown(tree)}.")


def fit(value: Any, hint: Any, where: str, build: Build = refuse) -> Any:
    """`value` as `hint` has it: a list becomes a tuple, a whole number a float.

    Args:
        value: of a file, or given to a constructor.
        hint: annotation of a field.
        where: dotted path of the field, for messages.
        build: makes an instance of a class from plain mappings.

    Raises:
        ValueError: another type, out of range, not finite; names `where`.
    """
    return _fit(value, hint, where, build, None)


def _fit(value: Any, hint: Any, where: str, build: Build, bounds: Range | None) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for rule in args[1:]:
            if isinstance(rule, OneOf):
                return rule.pick(value, where)
            if isinstance(rule, Range):
                bounds = rule
        return _fit(value, args[0], where, build, bounds)
    if origin in (typing.Union, types.UnionType):
        return _fit_one_of(value, args, where, build, bounds)
    if hint is Any:
        return value
    if hint in _NAMES:
        return _scalar(value, hint, where, bounds)
    if origin is tuple:
        return _fit_tuple(value, args, where, build)
    if origin in (dict, Mapping):
        return _fit_mapping(value, args, where, build)
    if isinstance(value, origin or hint):
        return value
    return build(value, hint, where)


def _scalar(value: Any, kind: Any, where: str, bounds: Range | None) -> Any:
    if kind in (int, float):
        if _is_number(value, kind) and _inside(value, kind, bounds):
            return kind(value)
    elif isinstance(value, kind):
        if kind is str:
            check_text(value, quoted(where))
        return value
    hint = f" {bounds.hint}" if bounds and bounds.hint else ""
    name = _NAMES[kind]
    if kind is float and _is_number(value, float) and not math.isfinite(_single(value)):
        name = "a finite number"
    raise ValueError(
        f"{quoted(where)} must be {name}{bounds or _wide(kind, value)}; got "
        f"{shown(value)}.{hint}"
    )


def _is_number(value: Any, kind: type) -> bool:
    wanted = numbers.Integral if kind is int else numbers.Real
    return isinstance(value, wanted) and not isinstance(value, bool | np.bool_)


def _single(value: Any) -> float:
    """A number as float32 has it, which is what is computed with; `inf` beyond it."""
    try:
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(value))
    except OverflowError:  # an integer that no float holds
        return math.inf


def _wide(kind: type, value: Any) -> str:
    """What a number is wrong in where no range says it."""
    if not _is_number(value, float) or not value:
        return ""
    return {int: " of 32 bits", float: f" of at most {_LARGEST:g}"}.get(kind, "")


def _inside(value: Any, kind: type, bounds: Range | None) -> bool:
    if kind is float:
        single = _single(value)
        if not abs(single) <= _LARGEST:
            return False
        # Both: what is above 0 may be 0 in float32.
        return bounds is None or bounds.holds(value) and bounds.holds(single)
    own = bounds is not None and None not in (bounds.least, bounds.most)
    return (own or _INT32.holds(value)) and (bounds is None or bounds.holds(value))


def _fit_one_of(
    value: Any, kinds: Sequence[Any], where: str, build: Build, bounds: Range | None
) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    for kind in kinds[:-1]:
        with contextlib.suppress(ValueError):
            return _fit(value, kind, where, build, bounds)
    return _fit(value, kinds[-1], where, build, bounds)


def _fit_tuple(value: Any, kinds: Sequence[Any], where: str, build: Build) -> tuple:
    if not isinstance(value, list | tuple):
        one = shown(value) if isinstance(value, str | int | float) else "..."
        raise ValueError(
            f"{quoted(where)} must be a list; got {shown(value)}. Write [{one}]."
        )
    if kinds[-1] is ...:
        kinds = [kinds[0]] * len(value)
    if len(kinds) != len(value):
        raise ValueError(
            f"{quoted(where)} must be a list of {len(kinds)}; got {len(value)}: "
            f"{shown(value)}."
        )
    pairs = enumerate(zip(value, kinds, strict=True))
    return tuple(fit(one, k, inner(where, n), build) for n, (one, k) in pairs)


def _fit_mapping(value: Any, kinds: Sequence[Any], where: str, build: Build) -> dict:
    if not isinstance(value, Mapping):
        raise ValueError(f"{quoted(where)} must be a mapping; got {shown(value)}.")
    return {
        fit(key, kinds[0], f"a key of {where}", build): fit(
            one, kinds[1], inner(where, key), build
        )
        for key, one in value.items()
    }


def inner(where: str, name: Any) -> str:
    """The path of a field of a field: `evict.budget` of `evict`."""
    name = name if isinstance(name, str) else shown(name)
    return f"{where}.{name}" if where else name


def quoted(where: str) -> str:
    """A path as messages name it."""
    return where if " " in where else f"`{where}`"


@functools.cache
def hints_of(cls: type) -> Mapping[str, Any]:
    """The annotations of a dataclass's fields, ranges among them."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


class Checked:
    """Base of dataclasses whose constructors hold their fields to the annotations.

    A `__post_init__` of a subclass calls this one first.
    """

    named: ClassVar[bool] = True
    """Whether messages name the class; not where callers give its fields themselves."""

    def __post_init__(self) -> None:
        cls = type(self)
        for name, hint in hints_of(cls).items():
            value = getattr(self, name)
            fitted = fit(value, hint, inner(cls.__name__ if self.named else "", name))
            if fitted is not value:
                object.__setattr__(self, name, fitted)
