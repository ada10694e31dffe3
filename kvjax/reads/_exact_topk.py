"""The tokens that a query really pays most attention to: the oracle of reads."""

import dataclasses
from typing import final

from kvjax.cache import TopTokens
from kvjax.config import sized
from kvjax.fields import Size
from kvjax.reads.base import AbstractBudgeted


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactTopK(AbstractBudgeted):
    """The tokens with the largest softmax weight: no other choice finds more.

    Per query and KV head, by the sum of the weights over the heads of the group, which
    read the same tokens. It bounds every read that chooses among as many tokens of the
    body. Nothing is dropped, and nothing saved: the choice reads every key.

    Attributes:
        join: tokens that move into the body together; newer ones are always read. Any
            codec that can append such blocks and holds each token by itself will do.

    No source: the top-k that SCBench's RetrievalAttention computes, of
    the whole group.
    """

    join: Size = sized(16, short=8)

    @property
    def block(self):
        return self.join

    def index(self, part, exact, seen, spec):
        del exact, seen, spec
        assert part.filled is not None
        ranked = TopTokens(
            keys=part.keys,
            values=part.values,
            positions=part.positions,
            filled=part.filled,
            page=1,
            budget=self.budget,
        )
        return (ranked,)
