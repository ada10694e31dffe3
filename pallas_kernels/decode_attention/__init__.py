"""Attention of a few queries per row over a whole part of the cache."""

from kvjax.pallas_kernels.decode_attention.api import (
    decode_attention as decode_attention,
)
