"""The bound arguments of `paged_decode`, as its backends take them."""

from typing import final

from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.quantized import Quantized
from kvjax.types import pytree, static


@final
@pytree
class PagedArgs:
    """One call, checked; `api.paged_decode` says what each argument is."""

    q: Float[Array, "B H T D"]
    k_pages: Float[Array, "N P D"] | Quantized
    v_pages: Float[Array, "N P D"] | Quantized
    selected: Int[Array, "B K C"]
    counts: Int[Array, "B K"]
    fill: Int[Array, "B K C"] | None
    bias: Float[Array, "B K C*P"] | None
    scale: float = static()
    softcap: float | None = static()
