"""DuoAttention: some heads keep the whole context, the others a fixed piece of it."""

import dataclasses
from typing import ClassVar, final

import numpy as np

from kvjax import exact
from kvjax.budgets.base import AbstractBudget
from kvjax.fields import Positive


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalHeads(AbstractBudget):
    """The heads that need the whole context keep it, the others `others` tokens.

    `keep` is the share of the model's KV heads that keep everything, rounded up to
    whole heads: those whose gates are the highest of all layers. With long contexts it
    is also the kept fraction of the tokens. Budgets in slots or bytes have no meaning.

    Attributes:
        others: slots of every other head.

    Source: DuoAttention (2410.10819) sections 2.2 and 2.3: retrieval heads by a
    quantile of trained gates (half of them with grouped queries), 64 sinks and 256
    recent tokens elsewhere. Deviations: ties go to the lower layer and head, where the
    authors' code breaks them at random.
    """

    others: Positive = 36
    per_head: ClassVar[bool] = True
    needs_gates: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.keep is None:
            raise ValueError(
                "retrieval_heads takes the share of heads that keep everything; got "
                f"slots={self.slots}, bytes={self.bytes}. Set `keep`, and `others` for "
                "the slots of the other heads."
            )

    def by_layer(self, mean, lengths, specs):
        del mean
        return -(-self._total(lengths, specs) // specs[0].num_kv_heads)

    def split(self, slots, lengths, specs):
        del slots
        xp = exact.namespace(lengths)
        seen, few = self._either(lengths, specs)
        whole = self._whole(specs)[:, None]
        each = xp.where(whole, seen[..., None], few[..., None])
        return each, self._total(lengths, specs)

    def fewest(self, counts):
        return exact.namespace(counts).minimum(counts, self._others)

    def _total(self, lengths, specs):
        """Slots of all heads of each layer, `[L, B]`."""
        seen, few = self._either(lengths, specs)
        many = np.sum(self._whole(specs), axis=1, dtype=np.int32)[:, None]
        return few * specs[0].num_kv_heads + many * (seen - few)

    def _either(self, lengths, specs):
        """Slots `[L, B]` of a head that keeps everything, and of another one.

        A window leaves no more than its tokens.
        """
        xp = exact.namespace(lengths)
        windows = [exact.LONGEST if s.window is None else s.window for s in specs]
        seen = xp.minimum(lengths, np.array(windows, np.int32)[:, None])
        return seen, xp.minimum(seen, self._others)

    @property
    def _others(self) -> int:
        return min(self.others, exact.LONGEST)

    def _whole(self, specs) -> np.ndarray:
        """Which heads keep everything, `[L, K]`."""
        assert self.keep is not None
        ranks = np.array([spec.head_ranks for spec in specs])
        assert ranks.size  # checked before any compute
        return ranks < exact.ceil_share(ranks.size, self.keep)
