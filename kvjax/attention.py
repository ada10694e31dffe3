"""Attention of a pass over its own tokens, as a layer hands them over."""

from collections.abc import Callable

from jaxtyping import Array, Float

from kvjax.pallas_kernels.dense import self_attention_with_mass
from kvjax.pallas_kernels.held import Earlier, held_attention
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.types import LayerInputs


def causal_attention(inputs: LayerInputs) -> Float[Array, "B H T D"]:
    """Full (or sliding-window) causal attention of tokens in order, padding last.

    Masks come from `positions`; padding attends to nothing and is attended by nothing.
    Temporaries grow linearly with the context.
    """
    return self_attention(inputs)[0]


def self_attention(
    inputs: LayerInputs,
    *,
    allowed: Callable[[Array, Array], Array] | None = None,
    bias: Callable[[Array, Array], Array] | None = None,
    earlier: Earlier | None = None,
    mass: bool = False,
    past: Partial | None = None,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"] | None]:
    """`causal_attention` under a pattern; with `mass` also the weight per key.

    Args:
        inputs: a layer's queries, keys and values, in order, right-padded.
        allowed: a sparse pattern on top, `(q_positions [B, t], k_positions [B, s])` to
            a mask `[B, H or 1, t, s]`; called with the first `s` keys of the row.
        bias: the same to log-weights `[B, K or 1, t, s]`.
        earlier: what tokens behind a compression point see of those before it; not
            together with the others.
        mass: whether to return what each key receives over all queries.
        past: attention of the same queries over tokens in front of all these; not
            together with `earlier`.
    """
    spec = inputs.spec
    if allowed is None and bias is None and past is None and not mass:
        out = held_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.positions,
            earlier,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
        )
        return out, None
    assert earlier is None
    part, received = self_attention_with_mass(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.positions,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        allowed=allowed,
        bias=bias,
        mass=mass,
        elsewhere=None if past is None else past.lse,
    )
    return (part if past is None else merge([past, part])).out, received
