"""What becomes of the tokens that are dropped? One file per published idea."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.cache import AbstractMerge as AbstractMerge
from kvjax.merges._cam import CaM as CaM
from kvjax.merges._d2o import D2O as D2O

MERGES: Mapping[str, type[AbstractMerge]] = MappingProxyType({"cam": CaM, "d2o": D2O})
