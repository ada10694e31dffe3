"""RoPE settings of a `config.json`, in both spellings, and back.

Older checkpoints carry `rope_theta` and `rope_scaling`; transformers 5 writes one
`rope_parameters`. We read both and write the older one, which both can load.
"""

import math
from typing import Any

from kvjax.fields import Amount, Fraction, Positive, PositiveReal
from kvjax.messages import nearest, shown
from kvjax.models.families.settings import Settings
from kvjax.rope import KINDS, Rope

_PARTIAL = "partial_rotary_factor"
_OLD_RANGE = "original_max_position_embeddings"
_COMMON = {"rope_theta", _PARTIAL}
_KEYS = {
    "default": _COMMON,
    "linear": _COMMON | {"factor", _OLD_RANGE},
    "dynamic": _COMMON | {"factor", _OLD_RANGE},
    "llama3": _COMMON
    | {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        _OLD_RANGE,
    },
    "yarn": _COMMON
    | {
        "factor",
        _OLD_RANGE,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
    },
    "longrope": _COMMON
    | {
        "factor",
        _OLD_RANGE,
        "attention_factor",
        "short_factor",
        "long_factor",
    },
}


def rope_settings(config: Settings) -> Settings:
    """The RoPE mapping of `config`, whichever spelling it uses; may be empty.

    Raises:
        ValueError: what stands there is no mapping, or both are there and differ.
    """
    old, new = config.inside("rope_scaling"), config.inside("rope_parameters")
    if not old.values or not new.values:
        found = old if old.values else new
    else:
        kinds = {rope_kind(one) for one in (old, new)} - {""}
        shared = {*old.values} & {*new.values} - {"rope_type", "type"}
        unlike = sorted(n for n in shared if old.values[n] != new.values[n])
        if len(kinds) > 1 or unlike:
            raise ValueError(
                f"`rope_scaling` {shown(old.values)} and `rope_parameters` "
                f"{shown(new.values)} contradict each other. Keep one of them."
            )
        found = Settings({**old.values, **new.values}, where=new.where)
    # transformers writes the default of `partial_rotary_factor` outside, too.
    for name, default in (("rope_theta", None), (_PARTIAL, 1.0)):
        inner, outer = found.values.get(name), config.values.get(name)
        if inner is not None and outer not in (None, default, inner):
            raise ValueError(
                f"`{name}` is {shown(outer)}, and {shown(inner)} in `{found.where}`. "
                "Keep one of them."
            )
    return found


def rope_kind(settings: Settings) -> str:
    """The kind of scaling, by its newer name or its older one; empty without any.

    Raises:
        ValueError: it has two, or none beside what only scaled kinds have.
    """
    named = [settings.get(key, str, "") for key in ("rope_type", "type")]
    kinds = {kind for kind in named if kind}
    if kinds == {"su", "longrope"}:  # two names of one
        return "longrope"
    if len(kinds) > 1:
        raise ValueError(
            f"`{settings.where}` has `rope_type` {shown(named[0])} and `type` "
            f"{shown(named[1])}. Keep one of them."
        )
    others = sorted(n for n in settings.values if settings.values[n] is not None)
    others = [n for n in others if n not in _COMMON]
    if not kinds and others:
        raise ValueError(
            f"`{settings.where}` has {shown(others)} and no `rope_type`, which says "
            f"what they are for. Name it: one of {list(KINDS)}."
        )
    return next(iter(kinds), "")


def read_rope(
    settings: Settings,
    config: Settings,
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
    kind = rope_kind(settings) or "default"
    if kind not in KINDS:
        raise ValueError(
            f"RoPE scaling {shown(kind)} is not supported; expected one of "
            f"{list(KINDS)}.{nearest(kind, KINDS)}"
        )
    # Old files keep inert leftovers beside type "default"; a scaled kind is strict.
    unknown = set(settings.values) - _KEYS[kind] - {"rope_type", "type"}
    if unknown and (kind != "default" or unknown & {"mrope_section", "factor"}):
        raise ValueError(
            f"RoPE scaling {kind!r} does not support {shown(sorted(unknown))}; "
            f"expected {sorted(_KEYS[kind])}."
        )
    share = settings.get(_PARTIAL, Fraction, config.get(_PARTIAL, Fraction, 1.0))
    return Rope(
        head_dim=head_dim,
        theta=settings.get("rope_theta", PositiveReal, theta),
        rotary_dim=None if share == 1 else int(head_dim * share),
        kind=kind,
        **_scaling(kind, settings, config),
    )


def reach(rope: Rope, settings: Settings, limit: int, *, extends: bool = True) -> int:
    """Positions that a model is for: `max_position_embeddings`, or what scaling adds.

    Args:
        rope: of the layers that see all positions.
        settings: flat RoPE mapping that it was read from.
        limit: `max_position_embeddings`.
        extends: see `AbstractFamily.linear_extends`.
    """
    trained = rope.original_max_positions or _trained(settings, Settings({}))
    return _reach(rope.kind, rope.factor, trained, limit, extends)


def _reach(
    kind: str, factor: float, trained: int | None, limit: int, extends: bool = True
) -> int:
    """`linear` and `dynamic` are by convention added to a config that keeps its range.

    So is YaRN by the documentation of Qwen, with the trained range beside it; where
    `llama3` finds the range as trained, it was added, too. vLLM reads them so.
    """
    if kind in ("default", "longrope") or (kind == "linear" and not extends):
        return limit
    if trained and limit > trained and kind != "yarn":
        return limit
    return max(limit, int(factor * (trained or limit)))


def _trained(settings: Settings, config: Settings) -> int | None:
    return config.get(_OLD_RANGE, Positive, settings.get(_OLD_RANGE, Positive, None))


def _scaling(kind: str, settings: Settings, config: Settings) -> dict[str, Any]:
    if kind == "default":
        return {}
    limit = config.get("max_position_embeddings", Positive, None)
    given = _trained(settings, config)
    trained = given or limit
    if kind != "linear" and not trained:
        raise ValueError(
            f"RoPE scaling {kind!r} needs `{_OLD_RANGE}` or "
            f"`max_position_embeddings`; got neither."
        )
    factor = settings.get("factor", PositiveReal, None)
    if factor is None and kind in ("yarn", "longrope") and limit and trained:
        factor = limit / trained
    if factor is None:
        raise ValueError(
            f"RoPE scaling {kind!r} needs `factor`; got "
            f"{shown(sorted(settings.values))}."
        )
    out: dict[str, Any] = {"factor": factor}
    if kind != "linear":
        out["original_max_positions"] = trained
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            out[name] = settings.get(name, PositiveReal)
    if kind == "yarn":
        out["beta_fast"] = settings.get("beta_fast", PositiveReal, 32.0)
        out["beta_slow"] = settings.get("beta_slow", PositiveReal, 1.0)
        out["truncate"] = settings.get("truncate", bool, True)
        out["attention_factor"] = _attention_factor(settings, factor)
    if kind == "longrope":
        out["attention_factor"] = settings.get("attention_factor", PositiveReal, None)
        for name in ("short_factor", "long_factor"):
            out[name] = settings.get(name, tuple[PositiveReal, ...])
    if kind in ("dynamic", "longrope"):
        out["reach"] = _reach(kind, factor, given, limit or trained or 0)
    return out


def _attention_factor(settings: Settings, factor: float) -> float | None:
    """`mscale` and `mscale_all_dim` are another way to write `attention_factor`."""
    given = settings.get("attention_factor", PositiveReal, None)
    top = settings.get("mscale", Amount, None)
    bottom = settings.get("mscale_all_dim", Amount, None)
    if given is not None or not (top and bottom):
        return given

    log_factor = 0.1 * math.log(max(factor, 1.0))
    return (log_factor * top + 1.0) / (log_factor * bottom + 1.0)


def partial_factor(rope: Rope) -> float:
    """`partial_rotary_factor` of `rope`."""
    partial = rope.width / rope.head_dim
    if int(rope.head_dim * partial) < rope.width:  # readers truncate
        partial = math.nextafter(partial, 1.0)
    return partial


def write_rope(
    rope: Rope, positions: int, *, extends: bool = True
) -> tuple[float, dict[str, Any] | None, int]:
    """`(rope_theta, rope_scaling, max_position_embeddings)`, the inverse of reading.

    Args:
        rope: of the layers that see all positions.
        positions: that the model is for.
        extends: see `AbstractFamily.linear_extends`.
    """
    if rope.kind == "default":
        return rope.theta, None, positions
    # Phi-3's reader in transformers 4 knows `type` alone, and three keys.
    key = "type" if rope.kind == "longrope" else "rope_type"
    scaling: dict[str, Any] = {key: rope.kind, "factor": rope.factor}
    trained = rope.original_max_positions
    if trained is not None:
        scaling[_OLD_RANGE] = trained
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        scaling["beta_fast"] = rope.beta_fast
        scaling["beta_slow"] = rope.beta_slow
        scaling["truncate"] = rope.truncate
    if rope.kind in ("yarn", "longrope") and rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    if rope.kind == "longrope":
        scaling["short_factor"] = list(rope.short_factor)
        scaling["long_factor"] = list(rope.long_factor)
        if trained and rope.factor == positions / trained:
            del scaling["factor"]
    if rope.kind in ("linear", "dynamic"):
        return rope.theta, *_old_range(rope, scaling, positions, extends)
    return rope.theta, scaling, positions


def _old_range(
    rope: Rope, scaling: dict[str, Any], positions: int, extends: bool
) -> tuple[dict[str, Any], int]:
    """The range before scaling, as transformers wants it; the trained one otherwise."""
    if rope.kind == "linear" and not extends:
        return scaling, positions
    scaling.pop(_OLD_RANGE, None)
    old = rope.original_max_positions or math.ceil(positions / rope.factor)
    if _reach(rope.kind, rope.factor, None, old) == positions:
        return scaling, old
    return scaling | {_OLD_RANGE: old}, positions
