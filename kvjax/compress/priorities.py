"""In what order a layer keeps the tokens of a prompt."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.cache import Memory, levelled
from kvjax.compress.eviction import Eviction
from kvjax.compress.observe import Observed
from kvjax.compress.survey import Share
from kvjax.types import Held, Lengths, Scores, padded_positions


def held_of(
    observed: Observed, lengths: Lengths, layer: Any = 0, before: Any = 0
) -> Held:
    """The prompt's tokens as scores see them; arguments as of `build`."""
    if observed.positions is not None:
        return Held(
            k=observed.k,
            v=observed.v,
            positions=observed.positions,
            seen=lengths + before,
            layer=layer,
            spec=observed.spec,
        )
    positions = padded_positions(lengths, observed.k.shape[2], before)
    rows = (observed.k, observed.v, positions, lengths + before)
    return Held.of_rows(*rows, layer=layer, spec=observed.spec)


def ranked(
    memory: Memory, held: Held, evict: Eviction, counts: Int[Array, "B"]
) -> Scores:
    """Scores of what is held in the form that is compared; `-inf` cannot be kept.

    Args:
        memory: of the score.
        held: the tokens, of a whole prompt or of any part of one.
        evict: what ranks them.
        counts: tokens per head that will be kept.
    """
    # Units add scores up and some budgets weigh them: these want no other form.
    compared = evict.unit.single and not evict.budget.weighs
    of = evict.score.ranked if compared else evict.score.score
    scores = of(memory, held, counts)
    usable = held.live
    if held.spec.window is not None:
        edge = held.seen[:, None, None] - 1 - held.spec.window
        usable = usable & (held.positions > edge)
    scores = jnp.where(usable, scores.astype(jnp.float32), -jnp.inf)
    if evict.unit.single and not evict.score.exact:
        scores = levelled(scores)
    return scores


def priorities_of(
    observed: Observed, held: Held, lengths: Lengths, evict: Eviction, share: Share
) -> Scores:
    """Priorities of all prompt tokens; padding and dead tokens are `-inf`."""
    assert observed.memory is not None
    scores = ranked(observed.memory, held, evict, share.counts)
    how = (scores, lengths, share.counts, evict.score.protected)
    return evict.unit.priorities(*how)


def own_or_handed(
    observed: Observed,
    held: Held,
    lengths: Lengths,
    evict: Eviction,
    share: Share,
    before: Scores | None,
) -> Scores:
    """Priorities of the layer's own, or those of an earlier one."""
    own = functools.partial(priorities_of, observed, held, lengths, evict, share)
    if share.leads is None or before is None:
        return own()
    return jax.lax.cond(share.leads, own, lambda: before)
