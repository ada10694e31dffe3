"""The bound arguments of `decode_attention`, as its backends take them."""

from typing import final

from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.quantized import Quantized
from kvjax.types import pytree, static


@final
@pytree
class DecodeArgs:
    """One call, checked; `api.decode_attention` says what each argument is."""

    q: Float[Array, "B H T D"]
    keys: Array | Quantized
    values: Array | Quantized
    lengths: Int[Array, "B K"]
    offsets: Int[Array, "B K+1"] | None
    positions: Array | None
    q_positions: Int[Array, "B T"] | None
    row: Int[Array, ""] | None
    scale: float = static()
    window: int | None = static()
    softcap: float | None = static()
