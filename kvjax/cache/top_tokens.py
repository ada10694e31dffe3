"""All tokens, of which a query reads those that it pays most attention to."""

from typing import final

import jax
import jax.numpy as jnp

from kvjax.cache.paging import AbstractPages, log_shares
from kvjax.turns import take
from kvjax.types import NEVER, pytree


@final
@pytree
class TopTokens(AbstractPages):
    """All tokens, single ones of which are read: a page is one slot.

    Each query token reads, per KV head, those with the largest softmax weight, summed
    over the heads of the group: of all choices of as many tokens it finds the most
    attention of the part.

    Cost: every key is read to choose. A yardstick, not a saving.
    """

    def summary(self, keys, values, positions):
        del keys, values, positions
        return {}

    def ranked(self, q, q_positions, first, last, seen, spec, turn):
        del q_positions, last
        keys, positions = take((self.keys, self.positions), turn)
        keys = keys.decode(positions, spec.rope)
        keys = jnp.where((first < NEVER)[..., None], keys, 0)  # free slots may be NaN
        return jax.nn.logsumexp(log_shares(q, keys, seen, spec), axis=2)
