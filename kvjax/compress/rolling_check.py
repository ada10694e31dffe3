"""What can be done behind every chunk of a row that is trained on.

Its backward pass repeats the chunks with the decisions of the forward pass: what is
held is then plain tokens in slots, of which it is known which stayed.
"""

from kvjax.compress.config import Compression
from kvjax.compress.eviction import Eviction, undivided
from kvjax.compress.plan import LayerPlan


def check_rolling(c: Compression) -> None:
    """A compression can be repeated behind every chunk of a row, and replayed.

    Raises:
        ValueError: it cannot; says which field is in the way.
    """
    if not c.prefill.causal:
        raise ValueError(
            f"chunks are read densely; got prefill={type(c.prefill).__name__}, whose "
            "pattern is that of a whole prompt. Set prefill=dense, or leave `chunks` "
            "out."
        )
    for plan in c.parts:
        _check_plan(plan)


def _check_plan(plan: LayerPlan) -> None:
    wrong = ""
    if not plan.store.plain:
        names = sorted({type(codec).__name__ for codec in plan.store.codecs})
        wrong = f"`store` must be plain; got {' and '.join(names)}"
    elif plan.changes:
        wrong = f"`read` must be all; got {type(plan.read).__name__}"
    elif plan.schedule.interval is not None or plan.schedule.chunk is not None:
        wrong = (
            "the end of a chunk, as `chunks` says, is when they evict; got schedule "
            f"{type(plan.schedule).__name__}, which is another time: use after_prefill"
        )
    elif plan.evict is not None:
        wrong = _wrong_eviction(plan.evict)
    if wrong:
        raise ValueError(
            f"what is held between chunks is plain tokens in slots, and {wrong}. "
            "Change that, or leave `chunks` out."
        )


def _wrong_eviction(evict: Eviction) -> str:
    """What of an eviction cannot be replayed behind every chunk, in words."""
    budget = evict.budget
    if budget.keep is not None:
        return (
            f"their number must not grow with the row; got evict.budget.keep="
            f"{budget.keep}: set evict.budget.slots in its stead, and no `keeps`"
        )
    if budget.per_head:
        return (
            "every head of a layer has the same number of slots; got evict.budget="
            f"{type(budget).__name__}: use uniform or pyramid"
        )
    if evict.merge is not None:
        name = type(evict.merge).__name__
        return f"they stay what they were; got evict.merge={name}: leave it out"
    wrong = undivided(evict)
    return f"a row has no whole: {wrong}" if wrong else ""
