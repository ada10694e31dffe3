"""The bound arguments of `quantize_pack`, as its backends take them."""

from typing import final

from jaxtyping import Array, Bool, Float

from kvjax.types import pytree, static


@final
@pytree
class PackArgs:
    """One call, checked; `api.quantize_pack` says what each argument is."""

    x: Float[Array, "*lead S D"]
    live: Bool[Array, "*lead S"]
    bits: int = static()
    axis: str = static()
    group: int = static()
    symmetric: bool = static()
