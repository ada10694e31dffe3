"""All ops by name. Tests, `make kernels` and the benchmarks are driven by this."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.pallas_kernels.dispatch import Op

OPS: Mapping[str, Op] = MappingProxyType(
    {
        # name: the OP of its api module
    }
)
