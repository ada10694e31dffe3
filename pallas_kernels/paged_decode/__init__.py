"""Attention of a few queries over selected pages of a pool."""

from kvjax.pallas_kernels.paged_decode.api import paged_decode as paged_decode
