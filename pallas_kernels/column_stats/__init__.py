"""Sums and maxima of softmax columns and diagonals without the S x S matrix."""

from kvjax.pallas_kernels.column_stats.api import ColumnStats as ColumnStats
from kvjax.pallas_kernels.column_stats.api import column_stats as column_stats
