"""`page_summary`: validation and dispatch."""

from jaxtyping import Array, Bool, Float

from kvjax.pallas_kernels import checks
from kvjax.pallas_kernels.dispatch import Backend, Op, Tiles
from kvjax.pallas_kernels.page_summary.summary import PageSummary

OP = Op(
    name="page_summary",
    backends=("reference", "xla", "tpu", "gpu"),
    gives=("B K P D", "B K P D", "B K P D"),
)


def page_summary(
    keys: Float[Array, "B K S D"],
    live: Bool[Array, "B K S"],
    *,
    page: int,
    backend: Backend = "auto",
    tiles: Tiles = None,
    interpret: bool = False,
) -> PageSummary:
    """Channel-wise minimum, maximum and mean of the live keys of each page.

    Args:
        keys: `[B, K, S, D]` f32, bf16 or f16; what dead slots hold, NaN included,
            does not matter.
        live: which slots count, `[B, K, S]`.
        page: slots per page; divides `S`.
        backend: see `dispatch.Op`.
        tiles: `{"slots": slots per step}`.
        interpret: run a Pallas backend in its interpreter.

    Returns:
        `PageSummary(low, high, mean)`, each `[B, K, S / page, D]` in the dtype of the
        keys; the mean is accumulated in float32. Pages without a live key give 0, so
        that their score stays finite.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        NotImplementedError: the chosen backend does not serve this case.

    Cost: reads the keys once, writes `3 / page` of their size.

    Source: Quest (2406.10774) section 3.3 for the bounds; the mean is MoBA's
        (2502.13189) and ShadowKV's (2410.21465) landmark.
    """
    if keys.ndim != 4:
        raise ValueError(f"`keys` must be [B, K, S, D]; got {list(keys.shape)}.")
    checks.dtype("keys", keys)
    checks.shape("live", live, tuple(keys.shape[:3]))
    checks.dtype("live", live, ("bool",))
    slots = keys.shape[2]
    if page < 1 or slots % page:
        raise ValueError(
            f"`page` must divide the {slots} slots; got {page}. Pad with dead slots."
        )
    return OP(keys, live, page=page, backend=backend, tiles=tiles, interpret=interpret)
