"""Dense attention in the shape the decoder calls it."""

from jaxtyping import Array, Float

from kvjax.pallas_kernels import dense
from kvjax.types import LayerInputs


def causal_attention(inputs: LayerInputs) -> Float[Array, "B H T D"]:
    """Full (or sliding-window) causal attention of a pass over its own keys.

    Masks come from `positions`; padding attends to nothing and is attended by nothing.
    Temporaries grow linearly with the context.
    """
    spec = inputs.spec
    out, _ = dense.causal_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.positions,
        inputs.positions,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
    )
    return out
