"""LoRA adapters in PEFT's layout, merged into their base model while it loads.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, with tensors such
as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kvjax.files import read_json
from kvjax.messages import nearest
from kvjax.models.adapter_settings import REMEDY, read_lora, refuse, typed
from kvjax.models.families.settings import Settings
from kvjax.models.gguf import gguf_tokenizer, gguf_weights, is_gguf
from kvjax.models.hub import (
    ADAPTER,
    ADAPTER_CONFIG,
    check_snapshot,
    checkpoint_directory,
)
from kvjax.models.quantised import unquantised
from kvjax.models.shards import (
    CONFIG,
    INDEX,
    SINGLE,
    Shards,
    Source,
    check_save,
    finite,
)
from kvjax.models.tokenizer import has_tokenizer, load_tokenizer

_UPDATE = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


def base_directory(directory: pathlib.Path) -> pathlib.Path:
    """The directory or file of an adapter's base model; any other one as it is.

    Raises:
        ValueError: an adapter whose base model cannot be found.
    """
    check_snapshot(directory)
    if not is_adapter(directory):
        return directory
    path = directory / ADAPTER_CONFIG
    settings = read_json(path)
    name = settings.get("base_model_name_or_path")
    revision = typed(Settings(settings), "revision", str, path, None)
    remedy = f"Set `base_model_name_or_path` in {path} to its directory or hub id."
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path} names no base model; got {name!r:.80}. {remedy}")
    beside = directory / name
    try:
        base = beside if os.path.isdir(beside) or is_gguf(beside) else None
        base = base or checkpoint_directory(name, revision or None)
        check_snapshot(base)
    except ValueError as error:
        raise ValueError(f"The base model of {directory}: {error} {remedy}") from error
    if is_adapter(base):
        raise ValueError(
            f"The base model of {directory} is itself an adapter: {base}. Merge that "
            f"one first (`kvjax convert {base} OUT`) and name the result in {path}."
        )
    return base


def tokenizer_directory(directory: pathlib.Path) -> pathlib.Path:
    """Where the tokenizer is: an adapter's own comes before that of its base model."""
    return directory if has_tokenizer(directory) else base_directory(directory)


def read_tokenizer(place: pathlib.Path) -> Any:
    """The tokenizer of a directory or of a GGUF file.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    return gguf_tokenizer(place) if is_gguf(place) else load_tokenizer(place)


def opened(directory: pathlib.Path) -> Source:
    """The tensors of a checkpoint or, merged, of an adapter and its base model."""
    folder = base_directory(directory)
    base = gguf_weights(folder) if is_gguf(folder) else _shards(folder)
    return Merged(base, directory) if is_adapter(directory) else base


def _shards(folder: pathlib.Path) -> Source:
    shards, config = Shards(folder), read_json(folder / CONFIG)
    check_save(shards, config)
    return unquantised(shards, config)


def is_adapter(directory: pathlib.Path) -> bool:
    """Whether a directory holds updates and no model of its own.

    Raises:
        ValueError: it holds both.
    """
    if not os.path.isfile(directory / ADAPTER_CONFIG):  # `is_file` may raise
        return False
    whole = [name for name in (SINGLE, INDEX) if (directory / name).is_file()]
    if whole:
        raise ValueError(
            f"{directory} holds an adapter ({ADAPTER_CONFIG}) and a whole model "
            f"({whole[0]}). Keep one of them: it does not say whether they are merged."
        )
    return True


class Merged:
    """A base model whose matrices hold an adapter's updates: `W + scale * B @ A`.

    The sum is made in float32 and cast once. `fan_in_fan_out` says nothing here: PEFT
    ignores it for linear layers, which all matrices of these models are.

    Raises:
        ValueError: an adapter that is not plain LoRA, or does not fit its base.
    """

    def __init__(self, base: Source, directory: pathlib.Path):
        self.base, self.place = base, base.place
        self.files, self.shapes = base.files, base.shapes
        self.updates = _updates(directory)
        self.settings = read_lora(directory / ADAPTER_CONFIG)
        pairs: dict[str, dict[str, str]] = {}
        for name in self.updates.shapes:
            found = _UPDATE.fullmatch(name)
            if found is None:
                refuse(f"tensor {name[:160]!r}", self.updates.place)
            pair = pairs.setdefault(found[1], {})
            if pair.setdefault(found[2], name) != name:
                raise ValueError(
                    f"{self.updates.place} has {pair[found[2]][:160]!r} and "
                    f"{name[:160]!r}, which are the same matrix. Remove one of them."
                )
        if not pairs:
            raise ValueError(f"{self.updates.place} holds no tensors.")
        self.pairs = {
            f"{module}.weight": self._checked(module, pair)
            for module, pair in pairs.items()
        }

    def _checked(self, module: str, pair: Mapping[str, str]) -> tuple[str, str, float]:
        """Names of A and B, and the scale, of one matrix that has both."""
        place, target = self.updates.place, f"{module}.weight"
        if target not in self.shapes:
            raise ValueError(
                f"{place} updates {target[:160]!r}, which the base model in "
                f"{self.base.place} lacks.{nearest(target, self.shapes):.200}"
            )
        if set(pair) != {"A", "B"}:
            raise ValueError(
                f"{place} has {next(iter(pair.values()))[:160]!r} and not its other "
                f"half; expected lora_A and lora_B. It is incomplete; save it again."
            )
        if why := self.settings.excludes(module):
            raise ValueError(
                f"{place} updates {target[:160]!r}, which {ADAPTER_CONFIG} leaves out "
                f"({why}). One of the two is of another adapter: mend it, or save the "
                "adapter again."
            )
        rank = self.settings.rank(module)
        got = [self.updates.shapes[pair[side]] for side in "AB"]
        shape = self.shapes[target]
        if len(shape) != 2 or got != [(rank, shape[1]), (shape[0], rank)]:
            raise ValueError(
                f"{place} has lora_A and lora_B of {str(got):.120} for "
                f"{target[:160]!r} of {str(shape):.80}; expected [(r, in), "
                f"(out, r)] with r = {rank} by {ADAPTER_CONFIG}."
            )
        return pair["A"], pair["B"], self.settings.scale(module)

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of a tensor, some at a time."""
        if name not in self.pairs:
            yield from self.base.rows(name, start, stop)
            return
        *names, scale = self.pairs[name]
        a, b = (self._whole(part) for part in names)
        for piece in self.base.rows(name, start, stop):
            held = piece.astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # looked for below
                update = b[start : start + len(piece)] @ a
                made = held + np.float32(scale) * update
            if not finite(made) and finite(held):
                raise ValueError(
                    f"Merging {self.updates.place} into {name[:160]!r} overflows: "
                    f"{names[0][:160]!r} times its other half and {scale:g} is beyond "
                    f"float32. The adapter is damaged or its training diverged."
                )
            yield made
            start += len(piece)

    def _whole(self, name: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # looked for below
            found = self.updates.whole(name).astype(np.float32)
        if not finite(found):
            raise ValueError(
                f"Tensor {name!r:.200} in {self.updates.place} holds NaN or Inf. The "
                f"adapter is damaged or its training diverged."
            )
        return found


def _updates(directory: pathlib.Path) -> Shards:
    path = directory / ADAPTER
    if not path.is_file():
        pickled = (directory / ADAPTER).with_suffix(".bin").is_file()
        why = "; its .bin is pickled, which can run code when loaded" * pickled
        raise ValueError(
            f"{directory} has {ADAPTER_CONFIG} and no {ADAPTER}{why}. Save it "
            f"with PEFT's `save_pretrained` as safetensors."
        )
    found = Shards(path)
    for name, entry in found.entries.items():
        if entry.kind not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"Tensor {name!r:.200} in {path} is {entry.kind}; expected F32, F16, "
                f"BF16 or F64. {REMEDY}"
            )
    return found
