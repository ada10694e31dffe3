"""Which blocks does prefill attention compute?"""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.prefills._delayed import Delayed as Delayed
from kvjax.prefills._dense import Dense as Dense
from kvjax.prefills._vertical_slash import VerticalSlash as VerticalSlash
from kvjax.prefills.base import AbstractPrefill as AbstractPrefill

PREFILLS: Mapping[str, type[AbstractPrefill]] = MappingProxyType(
    {"dense": Dense, "delayed": Delayed, "vertical_slash": VerticalSlash}
)
