"""The bound arguments of `page_score`, as its backends take them."""

from typing import final

from jaxtyping import Array, Float, Int

from kvjax.types import pytree, static


@final
@pytree
class PageArgs:
    """One call, checked; `api.page_score` says what each argument is."""

    q: Float[Array, "B H T D"]
    a: Float[Array, "R K P D"]
    b: Float[Array, "R K P D"] | None
    row: Int[Array, ""] | None
    mode: str = static()
    group: str = static()
    scale: float | None = static()
