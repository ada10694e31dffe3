"""Grouped affine quantisation with bit packing, and its inverse."""

from kvjax.pallas_kernels.quantize_pack.api import dequantize as dequantize
from kvjax.pallas_kernels.quantize_pack.api import quantize_pack as quantize_pack
