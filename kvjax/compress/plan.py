"""What is done in one layer: what is dropped, how the rest is held, what is read."""

import dataclasses
import math
from typing import Annotated, Self

from kvjax.cache import Places
from kvjax.codecs import AbstractCodec, Plain
from kvjax.compress.eviction import Eviction, undivided
from kvjax.config import sized
from kvjax.fields import Checked, Range
from kvjax.reads import AbstractRead, All
from kvjax.schedules import AbstractSchedule, AfterPrefill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage(Checked):
    """In what form keys and values are held.

    Attributes:
        keys: codec of the keys.
        values: codec of the values.
        residual: newest tokens stay plain until this many have gathered; then they
            are encoded as one block and never again. 0 encodes the prompt once and
            keeps later tokens plain.
        place: in which memory it lies.
    """

    keys: AbstractCodec = Plain()
    values: AbstractCodec = Plain()
    residual: Annotated[int, Range(0, 2**16)] = sized(0, short=32)
    place: Places = Places()

    def __post_init__(self):
        super().__post_init__()
        for name in ("keys", "values"):
            codec: AbstractCodec = getattr(self, name)
            if self.residual and not codec.appendable:
                raise ValueError(
                    f"store.{name}={type(codec).__name__} encodes a whole prompt and "
                    f"takes no later blocks; got residual={self.residual}. Use 0."
                )
            if self.residual % codec.append_multiple:
                raise ValueError(
                    f"`residual` must be a multiple of the {name} codec's group of "
                    f"{codec.append_multiple} tokens; got {self.residual}."
                )

    @property
    def codecs(self) -> tuple[AbstractCodec, AbstractCodec]:
        """Of keys and of values."""
        return self.keys, self.values

    @property
    def plain(self) -> bool:
        """Whether keys and values are held as they are."""
        return all(codec.plain for codec in self.codecs)

    @property
    def flat(self) -> bool:
        """Whether heads may lie in one buffer, see `AbstractCodec.flat`."""
        return all(codec.flat for codec in self.codecs)

    @property
    def multiple(self) -> int:
        """What the slots of a part must be a multiple of."""
        return math.lcm(*(codec.append_multiple for codec in self.codecs))

    def slot_bytes(self, head_dim: int, itemsize: int) -> float:
        """Bytes of one slot of one head, its position included."""
        return 4 + sum(codec.slot_bytes(head_dim, itemsize) for codec in self.codecs)

    def with_keep(self, keep: float) -> Self:
        """With another fraction of the numbers of a slot; values keep their share."""
        old = self.keys.kept
        assert old is not None
        values = self.values
        if values.kept is not None:
            values = values.with_keep(min(1.0, values.kept * keep / old))
        return dataclasses.replace(self, keys=self.keys.with_keep(keep), values=values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan(Checked):
    """What is done in one layer.

    Attributes:
        evict: which tokens are dropped, or None.
        store: in what form the rest is held.
        read: what a decode step looks at.
        schedule: when eviction happens.
    """

    evict: Eviction | None = None
    store: Storage = Storage()
    read: AbstractRead = All()
    schedule: AbstractSchedule = AfterPrefill()

    def __post_init__(self):
        super().__post_init__()
        if self.evict is not None and self.evict.budget.per_head:
            if not self.store.flat or self.changes:
                raise ValueError(
                    "head-wise budgets use one flat buffer per layer, which "
                    f"{self._fixed()} do not support. Use a uniform or pyramid budget."
                )
        if self.evict is not None and self.evict.values is not None:
            if not self.store.flat or self.changes:
                raise ValueError(
                    "a separate budget for values excludes residuals, low-rank storage "
                    f"and page reads; got {self._fixed()}."
                )
        if self.schedule.interval is not None:
            self._check_bounded()
            if self.store.place.body != "device":
                raise ValueError(
                    "what is evicted while decoding is written to at every step, and "
                    f"lies on the device; got store.place.body={self.store.place.body} "
                    f"with schedule.interval={self.schedule.interval}. Leave one out."
                )
        if self.schedule.chunk is not None:
            self._check_chunks(self.schedule.chunk)
        if not self.read.whole:
            self._check_pages()

    @property
    def block(self) -> int:
        """Tokens that move into the body together; 0: later tokens stay plain."""
        return self.store.residual or self.read.block

    @property
    def changes(self) -> bool:
        """Whether the body takes up later tokens, or queries choose what they read."""
        return bool(self.block) or not self.read.whole

    def _fixed(self) -> str:
        """What keeps the heads of a layer in step, in words."""
        found = []
        if self.store.residual:
            found.append(f"residuals (store.residual={self.store.residual})")
        if not self.read.whole:
            found.append(f"page reads ({type(self.read).__name__})")
        names = (type(x).__name__ for x in self.store.codecs if not x.flat)
        found += [f"codecs of whole layers ({name})" for name in names]
        return " and ".join(found)

    def _check_pages(self) -> None:
        read, residual = self.read, self.store.residual
        for name in ("keys", "values"):
            codec: AbstractCodec = getattr(self.store, name)
            whole = bool(read.block) and not codec.appendable
            if whole or read.page % codec.append_multiple:
                raise ValueError(
                    f"pages of {read.page} slots must be decodable by themselves, and "
                    f"so must later blocks, if the body of {type(read).__name__} takes "
                    f"them; store.{name} groups {codec.append_multiple} slots or "
                    "encodes the whole prompt. Use larger pages or another codec."
                )
        if residual and not read.block:
            raise ValueError(
                f"{type(read).__name__} leaves later tokens plain; got store.residual="
                f"{residual}. Use 0."
            )
        if read.block and residual % read.block:
            raise ValueError(
                f"`residual`={residual} must be a multiple of the page size "
                f"{read.block}."
            )

    @property
    def chunk_multiple(self) -> int:
        """What the tokens of a chunk of a prompt must be a multiple of."""
        if self.evict is not None:  # plain until the whole prompt has been read
            return 1
        return math.lcm(self.block or 1, self.read.page, self.store.multiple)

    def _check_chunks(self, size: int) -> None:
        """A prompt can be read chunk by chunk."""
        where = "schedule every_chunk reads a prompt piece by piece"
        if self.evict is not None and (wrong := undivided(self.evict)):
            raise ValueError(f"{where}, and {wrong}.")
        for name, codec in zip(("keys", "values"), self.store.codecs, strict=True):
            fits = codec.appendable if self.evict is None else not codec.observes
            if not fits:
                raise ValueError(
                    f"{where}, and store.{name}={type(codec).__name__} encodes what it "
                    "has seen whole. Use another codec, or schedule after_prefill."
                )
        read = type(self.read).__name__
        if self.read.observes:
            raise ValueError(
                f"{where}, and {read} looks at all of it. Use another read, or "
                "schedule after_prefill."
            )
        if self.read.exact and self.evict is None and not self.store.plain:
            raise ValueError(
                f"{where}, and {read} looks at tokens as they were, of which codes are "
                "left. Use plain storage, or schedule after_prefill."
            )
        if size % self.chunk_multiple:
            raise ValueError(
                f"schedule.size must be a multiple of {self.chunk_multiple}, the "
                f"tokens that are encoded together or make a page; got {size}."
            )
        if self.evict is not None and size < self.evict.score.protected:
            raise ValueError(
                f"{type(self.evict.score).__name__} protects "
                f"{self.evict.score.protected} tokens, more than a chunk of {size}. "
                "Raise schedule.size, or lower the score's window "
                "(evict.score.window)."
            )

    def _check_bounded(self) -> None:
        if self.evict is None:
            raise ValueError(
                "evicting while decoding (schedule.interval) needs something to evict "
                "by, and `evict` is not set."
            )
        simple = self.evict.unit.single and self.evict.values is None
        budget = self.evict.budget
        if not self.store.plain or not simple or budget.per_head or budget.surveys:
            raise ValueError(
                "schedule every_tokens works on single tokens in plain storage with "
                "the same slots in every head; use after_prefill for chunks, codecs, "
                "head-wise budgets or separate value budgets."
            )
        if not self.read.whole:
            raise ValueError(
                f"schedule every_tokens and read {type(self.read).__name__} exclude "
                "each other: pages are summaries of tokens that stay."
            )
        if self.evict.score.probes:
            raise ValueError(
                f"{type(self.evict.score).__name__} looks at a prompt that it has as a "
                "whole; schedule every_tokens needs a score of tokens as they come."
            )
