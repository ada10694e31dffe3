"""A row of published data, of which columns are asked strictly."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from kvjax.eval.tasks.lists import listed
from kvjax.messages import shown
from kvjax.plaintext import check_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The columns that were asked for, of one row.

    Attributes:
        place: file and row, for messages.
        values: by column; optional columns that the row does not have are left out.
    """

    place: str
    values: Mapping[str, Any]

    def wrong(self, column: str, wanted: str) -> ValueError:
        """The error of a column that holds something else than `wanted`."""
        return ValueError(
            f"{self.place}: `{column}` must be {wanted}; got "
            f"{shown(self.values.get(column))}."
        )

    def text(self, column: str, *, empty: bool = False) -> str:
        """The text of a column; `empty` says whether it may be of spaces alone.

        Raises:
            ValueError: it is no text, or an empty one; names file and row.
        """
        value = self.values.get(column)
        if not isinstance(value, str):
            raise self.wrong(column, "a text")
        check_text(value, f"{self.place}: `{column}`")
        if not empty and not value.strip():
            raise self.wrong(column, "a text that is not empty")
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        """One text or more: a list of them, a number, or a text that shows a list.

        `["a", "b"]` and `['a' 'b']`, as NumPy prints it, are lists; `[1, 2]` and
        `[0, 5)` are texts, since answers of mathematics look so.

        Raises:
            ValueError: there is none, or an empty one; names file and row.
        """
        value = self.values.get(column)
        if isinstance(value, str):
            found = listed(value)
            value = [value] if found is None else found
        elif isinstance(_written(value), str):
            value = [value]
        if not isinstance(value, list | tuple) or not value:
            raise self.wrong(column, "a text or a list of texts, not empty")
        made: list[Any] = [_written(one) for one in value]
        if not all(isinstance(one, str) and one.strip() for one in made):
            raise self.wrong(column, "texts that are not empty")
        for one in made:
            check_text(one, f"{self.place}: `{column}`")
        return tuple(made)

    def whole(self, column: str, least: int = 0) -> int:
        """A whole number of at least `least` and 32 bits; CSV has it as text.

        Raises:
            ValueError: it is none; names file and row.
        """
        value = self.values.get(column)
        if isinstance(value, str) and value.strip().isdecimal() and len(value) < 100:
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(column, f"a whole number >= {least} of 32 bits")
        if not least <= value < 2**31:
            raise self.wrong(column, f"a whole number >= {least} of 32 bits")
        return value


def _written(value: Any) -> Any:
    """A number as text, whole ones without a point; anything else as it is.

    A NaN is none: some writers put it where nothing is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return value
    return str(int(value) if value.is_integer() else value)
