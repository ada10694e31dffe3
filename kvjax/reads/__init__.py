"""What does each decode step look at?"""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.reads._all import All as All
from kvjax.reads._quest import Quest as Quest
from kvjax.reads.base import AbstractBudgeted as AbstractBudgeted
from kvjax.reads.base import AbstractRead as AbstractRead

READS: Mapping[str, type[AbstractRead]] = MappingProxyType({"all": All, "quest": Quest})
