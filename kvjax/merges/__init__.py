"""What becomes of the tokens that are dropped? One file per published idea."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.cache import AbstractMerge as AbstractMerge
from kvjax.merges._cam import CaM as CaM

MERGES: Mapping[str, type[AbstractMerge]] = MappingProxyType({"cam": CaM})
