"""Block-sparse attention of a prompt over itself or over a cache."""

from kvjax.pallas_kernels.sparse_prefill.api import sparse_prefill as sparse_prefill
from kvjax.pallas_kernels.sparse_prefill.patterns import BlockList as BlockList
from kvjax.pallas_kernels.sparse_prefill.patterns import Diagonals as Diagonals
from kvjax.pallas_kernels.sparse_prefill.patterns import Pattern as Pattern
from kvjax.pallas_kernels.sparse_prefill.patterns import Shared as Shared
