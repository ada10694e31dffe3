"""When is the cache compressed?"""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, final

from kvjax.config import sized
from kvjax.fields import Checked, Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractSchedule(Checked, abc.ABC):  # noqa: B024 (a closed set, told apart by type)
    """When eviction happens.

    Attributes:
        interval: decoded tokens between evictions; None: never while decoding.
    """

    interval: int | None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class AfterPrefill(AbstractSchedule):
    """Once, when the prompt has been seen; later tokens stay."""

    interval: ClassVar[None] = None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryTokens(AbstractSchedule):
    """After the prompt and again every `interval` decoded tokens: a bounded cache.

    Attributes:
        interval: decoded tokens between evictions; the cache holds at most the budget
            and this many more.
    """

    interval: Size = sized(1, short=4)


SCHEDULES: Mapping[str, type[AbstractSchedule]] = MappingProxyType(
    {"after_prefill": AfterPrefill, "every_tokens": EveryTokens}
)
