"""What a pass over the prompt leaves behind in one layer: enough for any budget."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.cache import AbstractRanking, Memory
from kvjax.compress.config import Compression
from kvjax.compress.plan import LayerPlan
from kvjax.pallas_kernels.dense import map_query_chunks, query_chunk
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.slots import attend_block, slot_mask, slot_mass
from kvjax.types import Held, LayerInputs, LayerSpec, Lengths, pytree, static


@pytree
class Observed:
    """What one layer's pass over the prompt leaves: enough for any budget.

    Attributes:
        k, v: `[B, K, S, D]`, keys after RoPE.
        memory: what the score remembers of the prompt, or None.
        look: what the budget has found in it.
        sides: what the codecs of keys and of values have.
        spec: the layer.
    """

    k: Float[Array, "*layers B K S D"]
    v: Float[Array, "*layers B K S D"]
    memory: Memory | None
    look: Any
    sides: tuple[Any, Any]
    spec: LayerSpec = static()


def wants_mass(c: Compression) -> bool:
    """Whether a score of `c` sums attention over all queries."""
    return any(score.needs_mass for score in c.scores)


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
    k, v, spec = inputs.k, inputs.v, inputs.spec
    return Observed(k=k, v=v, memory=memory, look=look, sides=sides, spec=spec)


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
    (b, h, tokens, _), spec = asked.q.shape, asked.spec
    how = {"scale": spec.scale, "softcap": spec.softcap}

    def some(q: Array, positions: Array, *elsewhere: Array) -> tuple[Partial, Array]:
        q = jnp.moveaxis(q, 2, 1)
        mask = slot_mask(positions, held.positions, spec.window)
        part = attend_block(q, held.k, held.v[..., :1], mask, **how)
        lse = part.lse
        for other in elsewhere:
            lse = jnp.logaddexp(lse, jnp.moveaxis(other, 2, 1))
        return part, jnp.sum(slot_mass(q, lse, held.k, mask, **how), axis=2)

    given = [jnp.moveaxis(asked.q, 1, 2), asked.positions]
    if asked.elsewhere is not None:
        given.append(jnp.moveaxis(asked.elsewhere, 1, 2))
    chunk = query_chunk(tokens, b * h * held.k.shape[2])
    return map_query_chunks(some, chunk, *given)[1]
