"""AdaKV: the heads of a layer share its slots by their scores."""

import dataclasses
from typing import ClassVar, final

from kvjax import exact
from kvjax.budgets.base import AbstractBudget, same_in_all
from kvjax.fields import Share


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(AbstractBudget):
    """Every head keeps its own best tokens; the rest goes to the best of the layer.

    Each head surely gets `safeguard` of the mean budget, rounded down but at least 1;
    the other slots go to the highest scores of all heads together, so that heads end
    with different budgets. `safeguard` is the shortest decimal it prints as.

    Attributes:
        safeguard: fraction of the mean budget that each head surely gets.

    Source: Ada-KV (2407.11550) algorithm 1; kvpress `AdaKVPress` (0.2).
    Deviations: tokens are really dropped and their memory freed (`Ragged` layout),
    where kvpress masks them.
    """

    safeguard: Share = 0.2
    per_head: ClassVar[bool] = True
    parts: ClassVar[bool] = True

    def by_layer(self, mean, lengths, specs):
        del lengths
        return same_in_all(mean, specs)

    def split(self, slots, lengths, specs):
        del lengths
        xp, heads = exact.namespace(slots), specs[0].num_kv_heads
        safe = exact.floor_share(slots, exact.decimal(self.safeguard))
        sure = xp.broadcast_to(xp.maximum(safe, 1)[..., None], (*slots.shape, heads))
        return sure, slots * heads
