"""Which blocks does prefill attention compute?"""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.prefills._a_shape import AShape as AShape
from kvjax.prefills._block_topk import BlockTopK as BlockTopK
from kvjax.prefills._by_head import ByHead as ByHead
from kvjax.prefills._delayed import Delayed as Delayed
from kvjax.prefills._dense import Dense as Dense
from kvjax.prefills._flex_prefill import FlexPrefill as FlexPrefill
from kvjax.prefills._tri_shape import TriShape as TriShape
from kvjax.prefills._vertical_slash import VerticalSlash as VerticalSlash
from kvjax.prefills._xattention import XAttention as XAttention
from kvjax.prefills.base import AbstractPrefill as AbstractPrefill
from kvjax.prefills.pattern import AbstractPattern as AbstractPattern

PREFILLS: Mapping[str, type[AbstractPrefill]] = MappingProxyType(
    {
        "dense": Dense,
        "delayed": Delayed,
        "a_shape": AShape,
        "tri_shape": TriShape,
        "vertical_slash": VerticalSlash,
        "block_topk": BlockTopK,
        "flex_prefill": FlexPrefill,
        "xattention": XAttention,
        "by_head": ByHead,
    }
)
