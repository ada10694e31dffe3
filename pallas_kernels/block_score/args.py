"""The bound arguments of `block_score`, as its backends take them."""

from typing import final

from jaxtyping import Array, Float

from kvjax.types import pytree, static


@final
@pytree
class BlockArgs:
    """One call, checked; `api.block_score` says what each argument is."""

    q: Float[Array, "B H T D"]
    k: Float[Array, "B K S D"]
    block_q: int = static()
    block_k: int = static()
    mode: str = static()
    stride: int = static()
    scale: float = static()
    causal: bool = static()
