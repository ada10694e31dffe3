"""What becomes of the tokens that are dropped? One file per published idea."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.cache import AbstractMerge as AbstractMerge

MERGES: Mapping[str, type[AbstractMerge]] = MappingProxyType({})
