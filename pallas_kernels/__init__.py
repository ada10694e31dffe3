"""Attention and quantisation ops; every attention op returns `(out, lse)`.

The paths here are plain XLA and run everywhere. Kernels for TPU and GPU join them
behind the same signatures.
"""

from kvjax.pallas_kernels.dense import causal_attention as causal_attention
from kvjax.pallas_kernels.partial import Partial as Partial
from kvjax.pallas_kernels.partial import merge as merge
