"""What `page_summary` returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class PageSummary(NamedTuple):
    """Channel-wise statistics of the live keys of each page, `[B, K, S / page, D]`.

    Attributes:
        low: minimum; 0 for a page without a live key, as are the other two.
        high: maximum.
        mean: over the live keys alone.
    """

    low: Float[Array, "B K P D"]
    high: Float[Array, "B K P D"]
    mean: Float[Array, "B K P D"]
