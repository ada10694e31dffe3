"""Every head has a pattern of its own, by a table that was measured."""

import dataclasses
from typing import final

import jax.numpy as jnp

from kvjax.prefills.base import AbstractPrefill
from kvjax.prefills.chosen import Chosen
from kvjax.prefills.pattern import AbstractPattern
from kvjax.types import LayerInputs, Lengths


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ByHead(AbstractPattern):
    """Heads see what one of several patterns says, each by its own.

    All of it is one call of `sparse_prefill`: what costs least in one head does not
    wait for another's kernel. Made by `kvjax.calibrate`.

    Attributes:
        patterns: sparse ones with this `block`, and `dense` for heads that see all.
            Their own `dense_below` does not matter.
        table: of every layer, the place in `patterns` of each query head's.
        model: which one it was measured on, for messages; weights may differ, layers
            and heads not.

    Source: MInference (2407.02490) section 3.2, the offline search of its heads'
    patterns. Deviations: a list per head and block of queries, where the source has a
    kernel for each pattern.

    Cost: the choices of all patterns that the table names, and `(S / block) ** 2`
    numbers per head. Where some head has columns, all take the time of as many.
    """

    patterns: tuple[AbstractPrefill, ...]
    table: tuple[tuple[int, ...], ...]
    model: str = ""

    def __post_init__(self):
        super().__post_init__()
        for number, one in enumerate(self.patterns):
            at, name = f"`patterns.{number}`", type(one).__name__
            if isinstance(one, ByHead) or not (
                one.causal or isinstance(one, AbstractPattern)
            ):
                raise ValueError(
                    f"{at} must be a sparse pattern of blocks, or dense; got {name}."
                )
            if isinstance(one, AbstractPattern) and one.block != self.block:
                raise ValueError(
                    f"{at} ({name}) must have the `block` of all, {self.block}; got "
                    f"{one.block}. Set both."
                )
        widths = {len(row) for row in self.table}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(
                "`table` must be a list of layers with as many heads each; got "
                f"{len(self.table)} layers with {sorted(widths)} heads."
            )
        most = len(self.patterns) - 1
        for layer, row in enumerate(self.table):
            if not all(0 <= one <= most for one in row):
                raise ValueError(
                    f"`table.{layer}` must name `patterns` by 0 .. {most}; got "
                    f"{list(row)}."
                )

    def suits(self, layers: int, heads: int) -> None:
        """See `AbstractPrefill`."""
        found = len(self.table), len(self.table[0])
        if found != (layers, heads):
            of = f" (measured on {self.model})" if self.model else ""
            raise ValueError(
                f"the table of by_head is one of {found[0]} layers with {found[1]} "
                f"query heads{of}; this model has {layers} with {heads}. Make one for "
                "it by `kvjax calibrate`."
            )

    def choose(self, inputs: LayerInputs, lengths: Lengths) -> Chosen:
        """See `AbstractPattern`."""
        (b, tokens), h = inputs.positions.shape, inputs.q.shape[1]
        n = -(-tokens // self.block)
        mine = jnp.asarray(self.table, jnp.int32)[inputs.depth.layer]  # [H]
        blocks = jnp.zeros((b, h, n, n), bool)
        columns, most, most_columns = None, 0, 0
        for number in sorted({one for row in self.table for one in row}):
            here, pattern = mine == number, self.patterns[number]
            if not isinstance(pattern, AbstractPattern):
                blocks, most = blocks | here[:, None, None], n
                continue
            chosen = pattern.choose(inputs, lengths)
            blocks = blocks | (here[:, None, None] & chosen.map(b, n))
            most = max(most, n if chosen.most is None else chosen.most)
            if chosen.columns is not None:
                some = here[:, None] & chosen.columns
                columns = some if columns is None else columns | some
                most_columns = max(most_columns, chosen.most_columns)
        return Chosen(
            blocks=blocks,
            columns=columns,
            block=self.block,
            most=most,
            most_columns=most_columns,
        )
