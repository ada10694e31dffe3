"""Layers with a sliding window, as `layer_types` and `sliding_window` say them."""

from kvjax.messages import nearest
from kvjax.models.config import DecoderConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(
    types: list[str] | None, default: list[str], window: int | None
) -> tuple[int | None, ...]:
    """`windows` from `layer_types`, or from the family's rule where they are absent."""
    types = default if types is None else types
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise ValueError(
            f"Layer types {unknown} are not supported; expected {FULL!r} or "
            f"{SLIDING!r}.{nearest(unknown[0], (FULL, SLIDING))}"
        )
    if SLIDING in types and window is None:
        raise ValueError(
            "`layer_types` has sliding layers but `sliding_window` is off."
        )
    if len(types) != len(default):
        raise ValueError(
            f"`layer_types` needs one entry per layer; got {len(types)} for "
            f"{len(default)} layers."
        )
    windows = tuple(window if kind == SLIDING else None for kind in types)
    return windows if any(windows) else ()


def write_layer_types(config: DecoderConfig) -> list[str]:
    """`layer_types` of a config."""
    return [FULL if spec.window is None else SLIDING for spec in config.layers]


def one_window(config: DecoderConfig) -> int | None:
    """The window that all sliding layers share, None without any."""
    sizes = {window for window in config.windows if window is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"{config.family!r} checkpoints hold one window size; got {sorted(sizes)}."
        )
    return next(iter(sizes), None)
