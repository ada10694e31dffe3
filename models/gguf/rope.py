"""RoPE of a GGUF file as the `rope_scaling` of a `config.json`.

Some of it stands in tensors: the factors of longrope, one for each angle, and those
that Llama 3's scaling comes to. The latter are turned back into the settings that they
came from, by trying those that models have.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.fields import Factor, Positive, PositiveReal
from kvjax.messages import nearest, shown
from kvjax.models.gguf.library import read
from kvjax.models.gguf.metadata import Metadata
from kvjax.models.gguf.names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS

_KINDS = ("none", "linear", "yarn", "longrope")
_RANGES = (8192, *(2**power for power in range(5, 20)))
_BANDS = ((1.0, 4.0), (1.0, 8.0), (1.0, 2.0))


def _factors(about: Metadata, name: str, count: int) -> tuple[float, ...] | None:
    """A tensor's number for each of `count` angles, or None.

    Raises:
        ValueError: there are others than that many positive numbers.
    """
    header = about.header
    tensor = header.tensors.get(name)
    if tensor is None:
        return None
    if tensor.shape != (count,):
        raise ValueError(
            f"{header.path}: {name!r} has the shape {shown(tensor.shape)}; expected "
            f"{(count,)}, a number for each angle."
        )
    found = read(header.path, tensor)[0]
    if not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(
            f"{header.path}: {name!r} holds numbers that are not positive and finite. "
            "The file is damaged."
        )
    return tuple(float(f"{one:.7g}") for one in found)


def rope_settings(about: Metadata, head_dim: int) -> dict[str, Any]:
    """The base, the share of channels that is turned, and the scaling.

    Raises:
        ValueError: settings that contradict each other, or that cannot be said.
    """
    width = about.own("rope.dimension_count", Positive, head_dim)
    if width > head_dim or width % 2:
        raise ValueError(
            f"{about.header.path}: `{about.architecture}.rope.dimension_count` is "
            f"{width}; expected an even number up to the {head_dim} channels of a head."
        )
    gemma = about.architecture == "gemma3"
    base = 1e6 if gemma else 1e4
    theta = about.own("rope.freq_base", PositiveReal, base)
    out: dict[str, Any] = {"rope_theta": theta}
    if gemma:
        out["rope_local_base_freq"] = about.own("rope.freq_base_swa", PositiveReal, 1e4)
    if width != head_dim:
        share = width / head_dim
        share = share if int(head_dim * share) == width else math.nextafter(share, 1)
        out["partial_rotary_factor"] = share
    trained = about.own("rope.scaling.original_context_length", Positive, None)
    if about.architecture == "phi3" and trained:
        out["original_max_position_embeddings"] = trained
    found = _scaling(about, width, theta)
    return out | ({"rope_scaling": found} if found else {})


def _scaling(about: Metadata, width: int, theta: float) -> dict[str, Any] | None:
    kind = _kind(about)
    where = f"{about.header.path}: `{about.architecture}.rope.scaling"
    short, long, plain = _tables(about, width // 2, kind)
    amplitude = about.own("rope.scaling.attn_factor", PositiveReal, 1.0)
    if short is not None and long is not None:
        return _longrope(about, short, long, amplitude)
    if kind == "longrope":
        raise ValueError(f"{where}.type` is {kind!r}, without {SHORT_FACTORS!r}.")
    if amplitude != 1:
        raise ValueError(
            f"{where}.attn_factor` is {amplitude} beside the type {kind!r}; expected 1."
        )
    if plain is not None:
        return _llama3(about, plain, width, theta)
    return None if kind == "none" else _by_factor(about, kind)


def _kind(about: Metadata) -> str:
    """The kind of scaling; a factor alone, in old files, is a linear one."""
    kind = about.own("rope.scaling.type", str, None)
    if kind is None:
        factor = about.own("rope.scale_linear", Factor, 1.0)
        return "none" if factor == 1 else "linear"
    if kind not in _KINDS:
        raise ValueError(
            f"{about.header.path}: `{about.architecture}.rope.scaling.type` is "
            f"{shown(kind)}; expected one of {list(_KINDS)}.{nearest(kind, _KINDS)}"
        )
    return kind


def _tables(about: Metadata, count: int, kind: str) -> list[tuple[float, ...] | None]:
    """Factors of short and of long contexts, and those of Llama 3."""
    path, names = about.header.path, (SHORT_FACTORS, LONG_FACTORS, ROPE_FACTORS)
    short, long, plain = found = [_factors(about, name, count) for name in names]
    if (short is None) != (long is None):
        raise ValueError(
            f"{path} has only one of {SHORT_FACTORS!r} and {LONG_FACTORS!r}. It is "
            "damaged; convert it again."
        )
    there = [name for name in names if name in about.header.tensors]
    both = short is not None and plain is not None
    if there and (both or kind not in ("none", "longrope")):
        raise ValueError(
            f"{path} contradicts itself: its RoPE scaling is {kind!r}, and its tensors "
            f"{there} say another one."
        )
    return found


def _by_factor(about: Metadata, kind: str) -> dict[str, Any] | None:
    """`linear` and `yarn`."""
    legacy = about.own("rope.scale_linear", Factor, None)
    factor = about.own("rope.scaling.factor", Factor, legacy)
    if factor is None:
        raise ValueError(
            f"{about.header.path}: `{about.architecture}.rope.scaling.type` is "
            f"{kind!r}, without a `rope.scaling.factor`."
        )
    found: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return None if factor == 1 else found
    trained = about.own("rope.scaling.original_context_length", Positive, None)
    given = {
        "original_max_position_embeddings": trained,
        "beta_fast": about.own("rope.scaling.yarn_beta_fast", PositiveReal, None),
        "beta_slow": about.own("rope.scaling.yarn_beta_slow", PositiveReal, None),
    }
    return found | {name: value for name, value in given.items() if value is not None}


def _longrope(
    about: Metadata, short: Sequence[float], long: Sequence[float], amplitude: float
) -> dict[str, Any]:
    trained = about.own("rope.scaling.original_context_length", Positive)
    factor = about.own("context_length", Positive) / trained
    usual = 1.0
    if factor > 1 and trained > 1:
        usual = math.sqrt(1 + math.log(factor) / math.log(trained))
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": list(short),
        "long_factor": list(long),
        "original_max_position_embeddings": trained,
    }
    if not math.isclose(usual, amplitude, rel_tol=1e-5):
        found["attention_factor"] = amplitude
    return found


def _llama3(
    about: Metadata, factors: Sequence[float], width: int, theta: float
) -> dict[str, Any] | None:
    """The settings whose factors these are."""
    wanted = np.asarray(factors)
    if np.allclose(wanted, 1, rtol=1e-5):
        return None
    factor = float(f"{wanted.max():.5g}")
    angles = theta ** -(np.arange(0, width, 2) / width)
    for trained in _RANGES:
        for low, high in _BANDS:
            turns = trained * angles / (2 * math.pi)
            blend = np.clip((turns - low) / (high - low), 0, 1)
            made = 1 / ((1 - blend) / factor + blend)
            if np.allclose(made, wanted, rtol=2e-5, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": trained,
                }
    raise ValueError(
        f"{about.header.path}: {ROPE_FACTORS!r} holds {shown(list(factors))}, which is "
        "not what Llama 3's scaling comes to with settings that are known. Load the "
        "model in Hugging Face layout."
    )
