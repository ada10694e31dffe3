"""What `column_stats` returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class ColumnStats(NamedTuple):
    """Softmax weight that keys and distances receive from a set of queries.

    Attributes:
        sum: per key, over the queries; 0 for keys that nobody sees.
        max: per key, the largest of one query; 0 for keys that nobody sees.
        slash: per distance `d = q_position - k_position < S`, over the queries; None
            unless asked for.
    """

    sum: Float[Array, "B H S"]
    max: Float[Array, "B H S"]
    slash: Float[Array, "B H S"] | None
