"""Attention mass per block of queries and keys, estimated without the matrix."""

from kvjax.pallas_kernels.block_score.api import block_score as block_score
