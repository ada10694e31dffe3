"""All ops by name. Tests, `make kernels` and the benchmarks are driven by this."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.pallas_kernels.decode_attention.api import OP as DECODE_ATTENTION
from kvjax.pallas_kernels.dispatch import Op
from kvjax.pallas_kernels.quantize_pack.api import OP as QUANTIZE_PACK
from kvjax.pallas_kernels.sparse_prefill.api import OP as SPARSE_PREFILL

OPS: Mapping[str, Op] = MappingProxyType(
    {
        # name: the OP of its api module
        "decode_attention": DECODE_ATTENTION,
        "quantize_pack": QUANTIZE_PACK,
        "sparse_prefill": SPARSE_PREFILL,
    }
)
