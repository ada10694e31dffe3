"""Log-weights of slots, shared by the fast paths."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.pallas_kernels.paged_decode.args import PagedArgs

SMALLEST_PAGE, LARGEST_PAGE = 16, 128


def kernel_page(page: int) -> None:
    """Refuse pages that the Pallas kernels do not move.

    Raises:
        NotImplementedError: pages are too small or too large.
    """
    if not SMALLEST_PAGE <= page <= LARGEST_PAGE:
        raise NotImplementedError(
            f"paged_decode: the kernels move pages of {SMALLEST_PAGE} to "
            f"{LARGEST_PAGE} slots; got {page}."
        )


def log_weights(args: PagedArgs) -> Float[Array, "B K S"]:
    """Log-weight of each slot of the selected pages: -inf where it is not live."""
    (b, k, c), page = args.selected.shape, args.k_pages.shape[1]
    slot = jnp.arange(page, dtype=jnp.int32)
    filled = jnp.where(jnp.arange(c) < args.counts[..., None], page, 0)
    if args.fill is not None:
        filled = jnp.minimum(filled, args.fill)
    live = (slot < filled[..., None]).reshape(b, k, c * page)
    return jnp.where(live, 0.0 if args.bias is None else args.bias, -jnp.inf)
