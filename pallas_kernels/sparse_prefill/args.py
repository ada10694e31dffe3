"""The bound arguments of `sparse_prefill`, as its backends take them."""

from typing import final

from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.sparse_prefill.layout import Rules
from kvjax.pallas_kernels.sparse_prefill.patterns import Pattern
from kvjax.types import pytree, static


@final
@pytree
class SparseArgs:
    """One call, checked; `api.sparse_prefill` says what each argument is.

    Here `kv_len` ends at the last key that a query of the call can see.
    """

    q: Float[Array, "B H T D"]
    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    pattern: Pattern
    q_start: Int[Array, "B"]
    kv_len: Int[Array, "B"]
    rules: Rules = static()
