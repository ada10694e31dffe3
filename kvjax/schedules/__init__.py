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
    chunk: ClassVar[int | None] = None
    """Tokens of a prompt that are read together; None: all of them."""


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


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryChunk(AbstractSchedule):
    """Behind every chunk of the prompt: a prompt of any length in bounded memory.

    A chunk attends to what is held of the chunks before it and to itself. Then its
    tokens are held too, and of all that is held the best stay, as many as the budget
    gives the whole prompt; without eviction all stay, in the form of `store`. Between
    chunks, tokens that may still be evicted are plain; what is left of them in the end
    is encoded.

    Attributes:
        size: tokens of a chunk.
        interval: decoded tokens between evictions later, as of `every_tokens`; None:
            never while decoding.

    Source: chunked prefill of bounded caches as of "Learning how to Forget"
    (2608.19920) section 3, and of kvpress `ChunkPress` (which compresses every chunk
    by itself). Deviation: the budget is that of the whole prompt from the first chunk
    on, so that scores of keys and values alone keep the same tokens however long the
    chunks are.
    """

    size: Size = sized(4096, short=16)
    interval: Size | None = None

    @property
    def chunk(self) -> int:  # type: ignore[override]
        return self.size


SCHEDULES: Mapping[str, type[AbstractSchedule]] = MappingProxyType(
    {
        "after_prefill": AfterPrefill,
        "every_chunk": EveryChunk,
        "every_tokens": EveryTokens,
    }
)
