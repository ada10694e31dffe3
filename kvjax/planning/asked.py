"""What a caller of `plan` gave: a model, compressions, chips, turned into records."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.compress import compression
from kvjax.compress.config import Compression
from kvjax.messages import shown
from kvjax.models.bundled import shape_of
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.io import load_config

DEFAULT = ("none", "int8", "kivi_4bit", "snapkv", "snapkv_kivi")
"""Compressions of a plan that was asked for none."""

Asked = Compression | str | os.PathLike[str]


def model_of(given: Any) -> tuple[DecoderConfig, str]:
    """Configuration and name of what was given as a model; weights stay where they are.

    Args:
        given: a decoder, its configuration, a directory, a GGUF file, the id of a model
            whose shape is bundled, or of one that the hub's cache has.

    Raises:
        ValueError: it is none of these, or its family is not known.
    """
    if isinstance(given, Decoder):
        return given.config, given.config.family
    if isinstance(given, DecoderConfig):
        return given, given.family
    try:
        return shape_of(given), os.path.basename(os.fspath(given)) or str(given)
    except ValueError as wrong:
        found = _in_hub_cache(given)
        if found is None:
            raise wrong from None
        return load_config(found), os.path.basename(given)


def _in_hub_cache(given: Any) -> str | None:
    """Directory of a model that has been fetched from the hub, nothing being asked."""
    if not isinstance(given, str) or given.count("/") != 1 or os.path.lexists(given):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(given, "config.json")
    except ValueError:  # no id
        return None
    return os.path.dirname(found) if isinstance(found, str) else None


def compressions_of(given: Any) -> dict[str, Compression]:
    """Compressions by their names.

    Args:
        given: one, or several as a list or by names of their own: each a preset's name,
            a YAML file or a `Compression`; None: `DEFAULT`.

    Raises:
        ValueError: there is none, or something else.
    """
    if isinstance(given, Mapping):
        found = {str(name): _one(c) for name, c in given.items()}
    else:
        one = isinstance(given, Compression | str | os.PathLike)
        several = DEFAULT if given is None else [given] if one else given
        if not isinstance(several, Sequence):
            raise ValueError(
                "`c` must be a compression, the name of a preset, or several of them; "
                f"got {shown(given)}."
            )
        found = {}
        for c in several:
            name = "given" if isinstance(c, Compression) else str(c)
            while name in found:
                name += "'"
            found[name] = _one(c)
    if not found:
        raise ValueError(
            "`c` names no compression. Leave it out for some of each kind."
        )
    return found


def _one(given: Any) -> Compression:
    return given if isinstance(given, Compression) else compression(given)


SPLIT = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
"""What axis `model` splits, by the table of `models.sharding`."""


def mesh_of(
    chips: int, mesh: Mapping[str, int] | None, config: DecoderConfig, batch: int
) -> dict[str, int]:
    """Axes of the mesh, `data` and `model`: as given, or as many ways as heads divide.

    Args:
        chips: how many.
        mesh: sizes by axis, or None.
        config: of the model.
        batch: rows.

    Raises:
        ValueError: other axes, sizes that are none or do not make up the chips, or that
            do not divide the model or the rows.
    """
    if mesh is None and chips == 1:
        return {}
    sizes = {name: getattr(config, name) for name in SPLIT}
    if mesh is None:
        model = math.gcd(chips, *sizes.values())
        given = {"data": chips // model, "model": model}
    else:
        given = {"data": 1, "model": 1, **_axes(mesh, chips)}
    for name, size in sizes.items():
        if size % given["model"]:
            ways = math.gcd(*sizes.values())
            raise ValueError(
                f"a mesh of {given} splits the model's {name} of {size} over "
                f"{given['model']} chips, which does not divide. Take a divisor of "
                f"{ways} for `model`, and more of `data` for the rest."
            )
    if batch % given["data"]:
        raise ValueError(
            f"a mesh of {given} splits a batch of {batch} over {given['data']} chips, "
            "which does not divide. Take a multiple as the batch, or less of `data`."
        )
    return given


def _axes(mesh: Any, chips: int) -> Mapping[str, int]:
    if not isinstance(mesh, Mapping) or not set(mesh) <= {"data", "model"}:
        raise ValueError(
            f"`mesh` has sizes of the axes `data` (rows) and `model` (heads); got "
            f"{shown(mesh)}."
        )
    for axis, size in mesh.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"`mesh[{axis!r}]` must be an integer, at least 1; got {shown(size)}."
            )
    total = math.prod(mesh.values())
    if chips not in (1, total):
        raise ValueError(
            f"`mesh` of {dict(mesh)} has {total} chips; got chips={chips}. Make them "
            "equal, or leave one of them out."
        )
    return mesh
