"""A gradient for the choice of tokens, which by itself has none.

What a body keeps is a ranking cut off at a budget. In the backward pass a token's score
gets the effect that keeping it would have (or has) on the output, through a sigmoid
around the cut. The forward pass does not change.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.cache import Ragged, Slots
from kvjax.cache.parts import AbstractPart
from kvjax.pallas_kernels.partial import Partial
from kvjax.pallas_kernels.slots import slot_logits
from kvjax.types import LayerInputs, Scores, pytree

SMALL = 1e-6


@pytree
class Gates:
    """Which prompt tokens a body keeps.

    Attributes:
        kept: `[B, K, S]`.
        soft: `[B, K, S]`, the relaxed choice minus its own value: 0, with a gradient.
    """

    kept: Bool[Array, "B K S"]
    soft: Float[Array, "B K S"]


def gates(
    parts: tuple[AbstractPart, ...], scores: Scores, temperature: float
) -> Gates | None:
    """Gates of a body's tokens; None for bodies that hold more than one kind.

    Args:
        parts: the body.
        scores: what ranked the prompt's tokens; `+inf` is always kept, `-inf` never,
            and neither gets a gradient.
        temperature: width of the sigmoid, in standard deviations of a head's scores.
    """
    if len(parts) != 1 or not isinstance(parts[0], Slots | Ragged):
        return None
    kept = _kept(parts[0], scores)
    finite = jnp.isfinite(scores)
    plain = jnp.where(finite, scores, 0.0)
    fixed = jax.lax.stop_gradient(plain)
    count = jnp.maximum(jnp.sum(finite, axis=-1, keepdims=True), 1)
    count = count.astype(jnp.float32)
    mean = jnp.sum(fixed, axis=-1, keepdims=True) / count
    square = jnp.where(finite, jnp.square(fixed - mean), 0.0)
    spread = jnp.sqrt(jnp.sum(square, axis=-1, keepdims=True) / count) + SMALL
    least = jnp.min(jnp.where(kept & finite, fixed, jnp.inf), -1, keepdims=True)
    most = jnp.max(jnp.where(~kept & finite, fixed, -jnp.inf), -1, keepdims=True)
    least = jnp.where(jnp.isfinite(least), least, most)
    most = jnp.where(jnp.isfinite(most), most, least)
    cut = jnp.where(jnp.isfinite(least), (least + most) / 2, 0.0)
    relaxed = jax.nn.sigmoid((plain - cut) / (temperature * spread))
    relaxed = jnp.where(finite, relaxed, 0.0)
    return Gates(kept=kept, soft=relaxed - jax.lax.stop_gradient(relaxed))


def _kept(part: Slots | Ragged, scores: Scores) -> Bool[Array, "B K S"]:
    """Prompt tokens that a part holds; positions of a prompt are its places."""
    b, kv_heads, s = scores.shape
    row = jnp.arange(b)[:, None]
    none = jnp.zeros((b, kv_heads, s), bool)
    if isinstance(part, Ragged):
        at = jnp.where(part.positions >= 0, part.positions, s)
        return none.at[row, part.heads, at].set(True, mode="drop")
    at = jnp.where(part.positions >= 0, part.positions, s)
    head = jnp.arange(kv_heads)[:, None]
    return none.at[row[..., None], head, at].set(True, mode="drop")


def with_choice_gradient(
    found: Partial, gates: Gates, prompt: LayerInputs, q: Float[Array, "B H T D"]
) -> Partial:
    """`found`, with a gradient for what its body keeps.

    A token that is not kept would add `sigmoid(l - lse) (v - out)` to the output, with
    its logit `l`: exactly the difference that it makes. A kept one contributes
    `exp(l - lse) (v - out)`.

    Args:
        found: attention over the body and what came later.
        gates: of the body.
        prompt: keys and values that were chosen from.
        q: the queries of `found`, all of them behind the prompt.
    """
    spec = prompt.spec
    out, lse, q, k, v = jax.lax.stop_gradient(
        (found.out, found.lse, q, prompt.k, prompt.v)
    )
    b, h, t, d = q.shape
    kv_heads, s = k.shape[1:3]
    live = (prompt.positions >= 0)[:, None, :]
    k, v = (jnp.where(live[..., None], x, 0) for x in (k, v))
    logits = slot_logits(q, k, scale=spec.scale, softcap=spec.softcap)
    seen = jnp.isfinite(lse)
    anchor = jnp.where(seen, lse, 0.0).reshape(b, kv_heads, -1, t, 1)
    kept = gates.kept[:, :, None, None]
    share = logits - anchor
    share = jnp.where(kept, jnp.exp(jnp.minimum(share, 0.0)), jax.nn.sigmoid(share))
    share = jnp.where(live[:, :, None, None], share, 0.0)
    moved = (share * gates.soft[:, :, None, None]).reshape(b, kv_heads, -1, s)
    added = jnp.einsum("BKXS,BKSD->BKXD", moved, v, preferred_element_type=jnp.float32)
    added = added.reshape(b, h, t, d) - jnp.sum(moved, -1).reshape(b, h, t, 1) * out
    return Partial(found.out + jnp.where(seen[..., None], added, 0.0), found.lse)
