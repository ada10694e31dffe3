"""What a pass over the prompt leaves behind in one layer: enough for any budget."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import AbstractRanking, Memory
from kvjax.compress.config import Compression
from kvjax.compress.plan import LayerPlan
from kvjax.scorers.base import Asking, received
from kvjax.types import Held, LayerInputs, LayerSpec, Lengths, pytree, static


@pytree
class Observed:
    """What one layer's pass over the prompt leaves: enough for any budget.

    Attributes:
        k, v: `[B, K, S, D]`, keys after RoPE.
        positions: of tokens that are not all of the prompt; None: they are, in order.
        memory: what the score remembers of the prompt, or None.
        look: what the budget has found in it.
        sides: what the codecs of keys and of values have.
        index: what the read has.
        spec: the layer.
    """

    k: Float[Array, "*layers B K S D"]
    v: Float[Array, "*layers B K S D"]
    memory: Memory | None
    look: Any
    sides: tuple[Any, Any]
    index: Any = ()
    positions: Int[Array, "*layers B K S"] | None = None
    spec: LayerSpec = static()


def wants_mass(c: Compression) -> bool:
    """Whether a score or a read of `c` sums attention over all queries."""
    reads = (part.read for part in c.parts)
    return any(one.needs_mass for one in (*c.scores, *reads))


def observe(
    inputs: LayerInputs,
    seen: Lengths,
    plan: LayerPlan,
    mass: Float[Array, "B H S"] | None,
) -> Observed:
    """Look at a prompt's pass once; `build` then works for any budget.

    Args:
        inputs: the layer's.
        seen: tokens of each row, those of a prefix included.
        plan: what is done in the layer.
        mass: what each token received of all queries, if the pass has it.
    """
    held, evict = inputs.held(seen), plan.evict
    memory, look = None, ()
    if evict is not None:
        memory = remember(evict.score, None, inputs, held, mass)
        look = evict.budget.look(inputs, held)
    keys, values = plan.store.codecs
    sides = (
        keys.observe(inputs, held, "keys"),
        values.observe(inputs, held, "values"),
    )
    if plan.read.needs_mass and mass is None:
        mass = mass_of(inputs, held)
    return Observed(
        k=inputs.k,
        v=inputs.v,
        memory=memory,
        look=look,
        sides=sides,
        index=plan.read.observe(inputs, held, mass),
        spec=inputs.spec,
    )


def remember(
    score: AbstractRanking,
    before: Memory | None,
    asked: LayerInputs,
    held: Held,
    mass: Float[Array, "B H S"] | None = None,
) -> Memory:
    """What a score remembers after more queries.

    Args:
        score: what will rank.
        before: what it remembers of those before; None: there were none.
        asked: the new tokens.
        held: the tokens that `before` is about, slot by slot, and behind them the new
            ones.
        mass: what each of them receives of the new queries; None: found out if wanted.
    """
    slots = score.tokens(asked)
    if before is not None:
        slots = jax.tree.map(
            lambda x, y: jnp.concatenate([x, y], axis=2), before.slots, slots
        )
    if score.needs_mass:
        slots = score.received(slots, mass_of(asked, held) if mass is None else mass)
    row = score.row(asked, None if before is None else before.row)
    return Memory(slots=slots, row=row)


def mass_of(asked: LayerInputs, held: Held) -> Float[Array, "B H S"]:
    """Softmax weight of each token held, summed over the queries; memory as `S`."""
    asking = Asking(q=asked.q, positions=asked.positions, elsewhere=asked.elsewhere)
    return received(asking, held, lambda weights, _: jnp.sum(weights, axis=2))
