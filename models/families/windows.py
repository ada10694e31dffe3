"""Layers with a sliding window, as `layer_types` and `sliding_window` say them."""

from kvjax.fields import Positive
from kvjax.messages import nearest, shown
from kvjax.models.config import DecoderConfig, Layers
from kvjax.models.families.settings import Settings

FULL, SLIDING = "full_attention", "sliding_attention"


def same_window(config: Settings) -> tuple[int | None, ...]:
    """`windows` of layers that all have `sliding_window`; null: none."""
    window = config.get("sliding_window", Positive, None)
    layers = config.get("num_hidden_layers", Layers)
    check_alike(config, window)
    return () if window is None else (window,) * layers


def check_alike(config: Settings, window: int | None) -> None:
    """`layer_types`, where it is there, says of all layers what the family has.

    Raises:
        ValueError: other kinds, or another number of layers.
    """
    kind = FULL if window is None else SLIDING
    rule = [kind] * config.get("num_hidden_layers", Layers)
    types = config.get("layer_types", tuple[str, ...], tuple(rule))
    family = config.values.get("model_type")
    if len({*types}) > 1:
        raise ValueError(
            f"{shown(family)} has one window for all layers; got `layer_types` "
            f"{shown(sorted({*types}))}. Alternating layers are another architecture."
        )
    read_layer_types(config, rule, window)
    if kind not in types:
        raise ValueError(
            f"All layers of this {shown(family)} are {kind!r} by `sliding_window` "
            f"({window}); got `layer_types` of {types[0]!r}. Mend one of them."
        )


def read_layer_types(
    config: Settings, default: list[str], window: int | None
) -> tuple[int | None, ...]:
    """`windows` from `layer_types`, or from the family's rule where they are absent."""
    types = config.get("layer_types", tuple[str, ...], tuple(default))
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise ValueError(
            f"Layer types {shown(unknown)} are not supported; expected {FULL!r} or "
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
