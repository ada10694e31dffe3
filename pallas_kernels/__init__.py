"""Attention and quantisation ops; every attention op returns `(out, lse)`.

`registry.OPS` lists the ops that `dispatch.Op` chooses an implementation for: XLA
everywhere, Pallas on TPU and GPU. Dense attention and the merge of parts are XLA alone.
"""

from kvjax.pallas_kernels.dense import causal_attention as causal_attention
from kvjax.pallas_kernels.partial import Partial as Partial
from kvjax.pallas_kernels.partial import merge as merge
