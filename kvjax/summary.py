"""What a cache holds, and what a compression does, as a few lines of text.

Notebooks show values by these lines; `repr` stays that of the dataclass.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import yaml

from kvjax import messages
from kvjax.cache import AbstractPart, ByShard, KVCache, LayerCache, Ragged, Shared
from kvjax.codecs import AbstractEncoded, OnHost
from kvjax.compress.config import Compression
from kvjax.compress.presets import canonical
from kvjax.depth import members
from kvjax.types import nbytes

SIDES = ("keys", "values")
HEADS = ["layers", "part", "slots", "keys", "values", "bytes", "filled", "free"]


def bytes_label(value: float) -> str:
    """`48 KiB`: a byte count in the largest unit that keeps it at one or more."""
    units = ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    digits = ".3g" if value < 999.5 else ".0f"  # 1000 KiB, not 1e+03
    return f"{value:{digits}} {units[0]}"


def describe_compression(c: Compression) -> str:
    """Its canonical YAML, which leaves defaults out."""
    return canonical(c).rstrip()


def describe_cache(cache: KVCache) -> str:
    """Rows, tokens and bytes of a cache, then its parts, layer by layer.

    Layers whose parts are equal stand in one line a part, whose numbers are those of
    all of them and of all rows: bytes, and slots that are filled or free. Where arrays
    have no values (under `jit`, or after they were donated) only sizes are shown.

    Cost: counts slots on the device and waits for it.
    """
    known = all(map(_has_values, jax.tree.leaves(cache)))
    found = {
        n: tuple(_lines(group, turn, len(numbers), known))
        for group, numbers in zip(cache.groups, members(cache.loops), strict=True)
        for turn, n in enumerate(numbers)
    }
    lines = [found[n] for n in range(cache.num_layers)]
    table, first = [tuple(HEADS)], 0
    for same, those in itertools.groupby(lines):
        count = len(list(those))
        label = f"{first}..{first + count - 1}" if count > 1 else f"{first}"
        for line in same:
            table.append((label, *line.cells(count)))
            label = ""
        first += count
    columns = len(HEADS) if known else HEADS.index("filled")
    shown = _aligned([row[:columns] for row in table])
    return "\n".join([_head(cache, known), *shown])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line:
    """One part of one layer; `filled` is None where that is not known."""

    kind: str
    slots: str = ""
    keys: str = "-"
    values: str = "-"
    size: float
    capacity: int = 0
    filled: int | None = None

    def cells(self, layers: int) -> tuple[str, ...]:
        """The columns from `part` on, of so many layers like this."""
        size, used, free = bytes_label(layers * self.size), "", ""
        if self.filled is not None:
            used = str(layers * self.filled)
            free = str(layers * (self.capacity - self.filled))
        return (self.kind, self.slots, self.keys, self.values, size, used, free)


def _lines(group: LayerCache, turn: int, turns: int, known: bool) -> Iterator[_Line]:
    """The parts of one of a group's layers."""
    for part in (*group.parts, group.tail):
        own = part.part if isinstance(part, Shared | ByShard) else part
        fields = vars(own)
        sides = {name: _holder(fields[name]) for name in SIDES if name in fields}
        width, size = own.positions.shape[-1], nbytes(part) / turns
        capacity = own.positions.size // turns
        if isinstance(own, Ragged):
            slots = width  # of all layers
            width = _longest(own, turn) if known else slots // turns
            capacity = own.positions.shape[0] * width
            size = nbytes(part) * width / slots
        kind = type(own).__name__
        yield _Line(
            kind=f"{kind}, shared" if isinstance(part, Shared) else kind,
            slots=f"{width} {'in all' if isinstance(own, Ragged) else 'per head'}",
            size=size,
            capacity=capacity,
            filled=_live(own, turn) if known else None,
            **sides,
        )
    if group.tracking is not None:
        kind = type(group.tracking).__name__
        yield _Line(kind=kind, size=nbytes(group.tracking) / turns)


def _holder(side: AbstractEncoded | jax.ShapeDtypeStruct) -> str:
    """What keys or values are held as: its class, or the dtype of a bare array."""
    if isinstance(side, OnHost):
        return f"{type(side.of).__name__}, on the host"
    if isinstance(side, AbstractEncoded):
        return type(side).__name__
    return side.dtype.name


def _head(cache: KVCache, known: bool) -> str:
    rows = cache.length.shape[0]
    about = f"{rows} row{'s' if rows > 1 else ''}"
    size = cache.nbytes
    if not known:
        return f"{about}, {bytes_label(size)}"
    lengths = np.asarray(cache.length)
    low, high = lengths.min(), lengths.max()
    seen = f"{low}" if low == high else f"{low}..{high}"
    groups = zip(cache.groups, members(cache.loops), strict=True)
    per_token = sum(len(numbers) * _token_bytes(group) for group, numbers in groups)
    share = size / (per_token * max(int(lengths.sum()), 1))
    return (
        f"{about}, {seen} tokens seen, {bytes_label(size)}: {share:.2f} of the keys "
        "and values of all tokens"
    )


def _token_bytes(layer: LayerCache) -> int:
    """Of the keys and values of one token, not compressed."""
    itemsize = layer.tail.keys.dtype.itemsize
    return 2 * layer.spec.num_kv_heads * layer.spec.head_dim * itemsize


def _has_values(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    if isinstance(x, jax.Array):
        return not x.is_deleted() and x.is_fully_addressable
    return isinstance(x, np.ndarray)


def _longest(part: Ragged, turn: int) -> int:
    """Slots of a layer of the row that has the most."""
    edges = part.offsets[turn]
    return int(jnp.max(edges[:, -1] - edges[:, 0]))


def _live(part: AbstractPart, turn: int) -> int:
    """Slots of a layer that hold a token, of all rows."""
    if not isinstance(part, Ragged):
        return int(jnp.sum(part.positions[turn] >= 0))
    slot, edges = jnp.arange(part.positions.shape[-1]), part.offsets[turn]
    mine = (slot >= edges[:, :1]) & (slot < edges[:, -1:])
    return int(jnp.sum((part.positions >= 0) & mine))


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines; numbers stand to the right."""
    wide = [max(map(len, column)) for column in zip(*table, strict=True)]
    words = HEADS.index("bytes")
    lines = []
    for row in table:
        cells = [cell.ljust(w) for cell, w in zip(row[:words], wide, strict=False)]
        numbers = zip(row[words:], wide[words:], strict=True)
        cells += [cell.rjust(w) for cell, w in numbers]
        lines.append("  ".join(cells).rstrip())
    return lines


def describe(value: KVCache | Compression) -> str:
    """See `describe_cache` and `describe_compression`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, KVCache):
        return describe_cache(value)
    if isinstance(value, Compression):
        return describe_compression(value)
    raise ValueError(
        "what is described must be a KVCache or a Compression; got "
        f"{messages.shown(value)}."
    )


def as_treescope(value: KVCache | Compression, path: str | None) -> Any:
    """`describe` for the `__treescope_repr__` of a value at `path`."""
    from treescope import rendering_parts as parts  # only notebooks need it

    text = describe(value)
    short = text.partition("\n")[0]
    if isinstance(value, Compression):  # where it fits, all of it in one line
        tree = yaml.safe_load(text)
        short = yaml.safe_dump(tree, default_flow_style=True, width=math.inf).rstrip()
    lines = [parts.text(line) for line in text.splitlines()]
    return parts.build_custom_foldable_tree_node(
        label=parts.text(type(value).__name__),
        contents=parts.fold_condition(
            expanded=parts.indented_children(lines),
            collapsed=parts.text(f": {short}"),
        ),
        path=path,
        expand_state=parts.ExpandState.EXPANDED,
    )
