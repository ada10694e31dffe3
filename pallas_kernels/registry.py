"""All ops by name. Tests, `make kernels` and the benchmarks are driven by this."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.pallas_kernels.block_score.api import OP as BLOCK_SCORE
from kvjax.pallas_kernels.column_stats.api import OP as COLUMN_STATS
from kvjax.pallas_kernels.decode_attention.api import OP as DECODE_ATTENTION
from kvjax.pallas_kernels.dispatch import Op
from kvjax.pallas_kernels.page_score.api import OP as PAGE_SCORE
from kvjax.pallas_kernels.page_summary.api import OP as PAGE_SUMMARY
from kvjax.pallas_kernels.paged_decode.api import OP as PAGED_DECODE
from kvjax.pallas_kernels.quantize_pack.api import OP as QUANTIZE_PACK
from kvjax.pallas_kernels.sparse_prefill.api import OP as SPARSE_PREFILL

OPS: Mapping[str, Op] = MappingProxyType(
    {
        # name: the OP of its api module
        "decode_attention": DECODE_ATTENTION,
        "page_score": PAGE_SCORE,
        "page_summary": PAGE_SUMMARY,
        "paged_decode": PAGED_DECODE,
        "quantize_pack": QUANTIZE_PACK,
        "sparse_prefill": SPARSE_PREFILL,
        "column_stats": COLUMN_STATS,
        "block_score": BLOCK_SCORE,
    }
)
