"""What the harness gives a model by name: `pretrained=DIR,compression=snapkv,...`."""

import pathlib
from collections.abc import Mapping
from typing import Any

from kvjax.compress.config import Compression
from kvjax.compress.presets import compression
from kvjax.messages import nearest, shown
from kvjax.models.bundled import bundled_models, model_directory, small_models
from kvjax.models.io import load

OPTIONS = (
    "keep",
    "compress_at",
    "batch",
    "max_length",
    "max_new_tokens",
    "rolling_from",
    "seed",
)
"""Arguments of `KvjaxLM` by their own names."""

ALIASES = {
    "model": "pretrained",
    "batch_size": "batch",
    "max_gen_toks": "max_new_tokens",
}

FIELD = "compression."
"""What arguments begin with that set a field: compression.evict.score.window=16."""

ELSEWHERE = ("device", "max_batch_size")
"""What the harness hands over to every model, and JAX knows by itself."""


def from_arguments(
    given: Mapping[str, Any], more: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and the other arguments of `KvjaxLM`.

    Args:
        given: what a user wrote.
        more: what the harness adds; None is nothing.

    Raises:
        ValueError: an unknown argument, one that is given twice, or no model.
    """
    found: dict[str, Any] = {}
    for name, value in (*given.items(), *more.items()):
        if value is None:
            continue
        own = ALIASES.get(name, name)
        if own in found and name not in given and found[own] != value:
            continue  # the harness's default, where the user has said something
        if own in found and found[own] != value:
            raise ValueError(f"`{own}` is given twice: as {name}, too. Give it once.")
        found[own] = value
    _check_names(found)
    fields = {
        n.removeprefix(FIELD): found.pop(n) for n in [*found] if n.startswith(FIELD)
    }
    name, dtype = found.pop("pretrained"), found.pop("dtype", "auto")
    chosen = compression_of(found.pop("compression", None), None, **fields)
    if dtype == "auto":
        dtype = "float32" if name in small_models() else "bfloat16"
    model, tokenizer = load(model_directory(str(name)), dtype)
    return model, tokenizer, {"compression": chosen, **found}


def _check_names(found: Mapping[str, Any]) -> None:
    known = ("pretrained", "dtype", "compression", *OPTIONS)
    for name in found:
        if name in ELSEWHERE:
            raise ValueError(
                f"`{name}`={shown(found[name])}: JAX chooses the device, and batches "
                "are `batch` contexts. Leave it out; JAX_PLATFORMS names a platform."
            )
        if name not in known and not name.startswith(FIELD):
            raise ValueError(
                f"unknown argument {shown(name)} of the model kvjax; expected some of "
                f"{[*known]} or {FIELD}FIELD.{nearest(name, known)}"
            )
    if "pretrained" not in found:
        raise ValueError(
            "the model kvjax needs pretrained=DIR, a checkpoint directory, a hub id, "
            f"or one of {[*bundled_models()]}."
        )


def compression_of(
    given: Compression | str | pathlib.Path | None,
    keep: float | None,
    **fields: Any,
) -> Compression:
    """A compression of what was given for one; None does nothing.

    Raises:
        ValueError: no such compression, or a `keep` where there is no budget.
    """
    if not isinstance(given, Compression):
        given = compression("none" if given is None else given, **fields)
    return given if keep is None else given.with_keep(keep)
