"""RoPE settings of a `config.json`, in both spellings, and back.

Older checkpoints carry `rope_theta` and `rope_scaling`; transformers 5 writes one
`rope_parameters`. We read both and write the older one, which both can load.
"""

import math
from collections.abc import Mapping
from typing import Any

from kvjax.messages import nearest
from kvjax.rope import KINDS, Rope

_COMMON = {"rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": _COMMON,
    "linear": _COMMON | {"factor"},
    "llama3": _COMMON
    | {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": _COMMON
    | {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
    },
}


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE mapping of `config`, whichever spelling it uses; may be empty."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"RoPE settings must be a mapping; got {found!r}.")
    return dict(found)


def read_rope(
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    head_dim: int,
    theta: float,
) -> Rope:
    """One layer kind's `Rope`.

    Args:
        settings: flat RoPE mapping (`rope_type` or `type`, and its parameters).
        config: the whole config, for the values that may stand outside.
        head_dim: `D`.
        theta: base where `settings` does not name one.
    """
    kind = settings.get("rope_type", settings.get("type", "default")) or "default"
    if kind not in KINDS:
        raise ValueError(
            f"RoPE scaling {kind!r} is not supported; expected one of {list(KINDS)}."
            f"{nearest(str(kind), KINDS)}"
        )
    # Old files keep inert leftovers beside type "default"; a scaled kind is strict.
    unknown = set(settings) - _KEYS[kind] - {"rope_type", "type"}
    if unknown and (kind != "default" or unknown & {"mrope_section", "factor"}):
        raise ValueError(
            f"RoPE scaling {kind!r} does not support {sorted(unknown)}; expected "
            f"{sorted(_KEYS[kind])}."
        )
    partial = settings.get("partial_rotary_factor")
    if partial is None:
        partial = config.get("partial_rotary_factor")
    return Rope(
        head_dim=head_dim,
        theta=float(settings.get("rope_theta") or theta),
        rotary_dim=None if partial in (None, 1, 1.0) else int(head_dim * partial),
        kind=kind,
        **_scaling(kind, settings, config),
    )


def _scaling(
    kind: str, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    if kind == "default":
        return {}
    limit = config.get("max_position_embeddings")
    trained = (
        config.get("original_max_position_embeddings")
        or settings.get("original_max_position_embeddings")
        or limit
    )
    factor = settings.get("factor")
    if factor is None and kind == "yarn" and limit and trained:
        factor = limit / trained
    if factor is None:
        raise ValueError(f"RoPE scaling {kind!r} needs `factor`; got {dict(settings)}.")
    out: dict[str, Any] = {"factor": float(factor)}
    if kind in ("llama3", "yarn"):
        out["original_max_positions"] = int(trained) if trained else None
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            if name not in settings:
                raise ValueError(f"RoPE scaling 'llama3' needs `{name}`.")
            out[name] = float(settings[name])
    if kind == "yarn":
        out["beta_fast"] = float(settings.get("beta_fast") or 32)
        out["beta_slow"] = float(settings.get("beta_slow") or 1)
        out["truncate"] = bool(settings.get("truncate", True))
        out["attention_factor"] = _attention_factor(settings, out)
    return out


def _attention_factor(
    settings: Mapping[str, Any], fields: Mapping[str, Any]
) -> float | None:
    """`mscale` and `mscale_all_dim` are another way to write `attention_factor`."""
    given = settings.get("attention_factor")
    top, bottom = settings.get("mscale"), settings.get("mscale_all_dim")
    if given is not None or not (top and bottom):
        return given

    log_factor = 0.1 * math.log(max(fields["factor"], 1.0))
    return (log_factor * top + 1.0) / (log_factor * bottom + 1.0)


def write_rope(rope: Rope) -> tuple[float, dict[str, Any] | None, float]:
    """`(rope_theta, rope_scaling, partial_rotary_factor)` of `rope`."""
    partial = rope.width / rope.head_dim
    if int(rope.head_dim * partial) < rope.width:  # readers truncate
        partial = math.nextafter(partial, 1.0)
    if rope.kind == "default":
        return rope.theta, None, partial
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        scaling["beta_fast"] = rope.beta_fast
        scaling["beta_slow"] = rope.beta_slow
        scaling["truncate"] = rope.truncate
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    return rope.theta, scaling, partial
