"""LoRA adapters in PEFT's layout, merged into their base model while it loads.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, with tensors such
as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
"""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from kvjax.files import read_json
from kvjax.messages import nearest
from kvjax.models.hub import ADAPTER, ADAPTER_CONFIG, checkpoint_directory
from kvjax.models.quantised import unquantised
from kvjax.models.shards import INDEX, SINGLE, Shards, Source, check_save, finite
from kvjax.models.tokenizer import has_tokenizer

_UPDATE = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_ENDLESS = re.compile(r"\)[*+?{]|[*+}][^)]*[*+{][^)]*[*+{]|.{300}", re.DOTALL)
_REMEDY = (
    "Merge it with PEFT (`merge_and_unload`, then `save_pretrained`) and load what it "
    "has saved."
)
# What else PEFT's LoRA may change. All are off by default, and so is any other `use_`.
_OTHER = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
# Ways to start an adapter that leave the base model as it is; PiSSA and others do not.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def base_directory(directory: pathlib.Path) -> pathlib.Path:
    """The directory of an adapter's base model; any other directory as it is.

    Raises:
        ValueError: an adapter whose base model cannot be found.
    """
    if not _is_adapter(directory):
        return directory
    path = directory / ADAPTER_CONFIG
    settings = read_json(path)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    remedy = f"Set `base_model_name_or_path` in {path} to its directory or hub id."
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path} names no base model; got {name!r:.80}. {remedy}")
    beside = directory / name
    try:
        base = beside if beside.is_dir() else None
        base = base or checkpoint_directory(name, revision or None)
    except ValueError as error:
        raise ValueError(f"The base model of {directory}: {error} {remedy}") from error
    if _is_adapter(base):
        raise ValueError(
            f"The base model of {directory} is itself an adapter: {base}. Merge that "
            f"one first (`kvjax convert {base} OUT`) and name the result in {path}."
        )
    return base


def tokenizer_directory(directory: pathlib.Path) -> pathlib.Path:
    """Where the tokenizer is: an adapter's own comes before that of its base model."""
    return directory if has_tokenizer(directory) else base_directory(directory)


def opened(directory: pathlib.Path) -> Source:
    """The tensors of a checkpoint or, merged, of an adapter and its base model."""
    folder = base_directory(directory)
    shards, config = Shards(folder), read_json(folder / "config.json")
    check_save(shards, config)
    base = unquantised(shards, config)
    return Merged(base, directory) if _is_adapter(directory) else base


def _is_adapter(directory: pathlib.Path) -> bool:
    if not (directory / ADAPTER_CONFIG).is_file():
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
        settings = read_json(directory / ADAPTER_CONFIG)
        where = directory / ADAPTER_CONFIG
        _check_plain(settings, where)
        pairs: dict[str, dict[str, str]] = {}
        for name in self.updates.shapes:
            found = _UPDATE.fullmatch(name)
            if found is None:
                _refuse(f"tensor {name[:160]!r}", self.updates.place)
            pairs.setdefault(found[1], {})[found[2]] = name
        if not pairs:
            raise ValueError(f"{self.updates.place} holds no tensors.")
        self.pairs = {
            f"{module}.weight": self._checked(module, pair, settings, where)
            for module, pair in pairs.items()
        }

    def _checked(
        self,
        module: str,
        pair: Mapping[str, str],
        settings: Mapping[str, Any],
        where: pathlib.Path,
    ) -> tuple[str, str, float]:
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
        rank = _rank(module, settings, where)
        got = [self.updates.shapes[pair[side]] for side in "AB"]
        shape = self.shapes[target]
        if len(shape) != 2 or got != [(rank, shape[1]), (shape[0], rank)]:
            raise ValueError(
                f"{place} has lora_A and lora_B of {str(got):.120} for "
                f"{target[:160]!r} of {str(shape):.80}; expected [(r, in), "
                f"(out, r)] with r = {rank} by {where.name}."
            )
        return pair["A"], pair["B"], _scale(module, rank, settings, where)

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows `start:stop` of a tensor, some at a time."""
        if name not in self.pairs:
            yield from self.base.rows(name, start, stop)
            return
        *names, scale = self.pairs[name]
        a, b = (self._whole(part) for part in names)
        for piece in self.base.rows(name, start, stop):
            update = b[start : start + len(piece)] @ a
            yield piece.astype(np.float32) + np.float32(scale) * update
            start += len(piece)

    def _whole(self, name: str) -> np.ndarray:
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
                f"BF16 or F64. {_REMEDY}"
            )
    return found


def _refuse(what: str, where: pathlib.Path) -> NoReturn:
    raise ValueError(
        f"{where} is more than LoRA updates of matrices: {what} is not read. {_REMEDY}"
    )


def _check_plain(settings: Mapping[str, Any], where: pathlib.Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{where} has `peft_type` {kind!r:.40}; only 'LORA' is read. {_REMEDY}"
        )
    others = [name for name in settings if name.startswith("use_")]
    for name in (*_OTHER, *others):
        if settings.get(name) and name != "use_rslora":
            _refuse(f"`{name}` ({str(settings[name]):.80})", where)
    if settings.get("bias", "none") not in ("none", None):
        _refuse(f"`bias` {settings['bias']!r:.40}", where)
    start = settings.get("init_lora_weights")
    if start not in _STARTS:
        _refuse(f"`init_lora_weights` {start!r:.40}, which changes the base,", where)


def _pattern(name: str, module: str, settings: Mapping[str, Any], where: pathlib.Path):
    """A module's own entry of `rank_pattern` or `alpha_pattern`, as PEFT finds it."""
    table = settings.get(name) or {}
    if not isinstance(table, Mapping):
        raise ValueError(f"`{name}` in {where} must be a mapping; got {table!r:.80}.")
    for pattern, value in table.items():
        if _ENDLESS.search(pattern):
            raise ValueError(
                f"`{name}` in {where} has {pattern!r:.80}; repeated groups may take "
                "for ever and are not read. Name the modules one by one."
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(
                f"`{name}` in {where} has {pattern!r:.80}, which is no regular "
                f"expression: {error}."
            ) from None
    return None


def _rank(module: str, settings: Mapping[str, Any], where: pathlib.Path) -> int:
    rank = _pattern("rank_pattern", module, settings, where)
    rank = settings.get("r", 8) if rank is None else rank
    if type(rank) is not int or rank < 1:
        raise ValueError(
            f"`r` in {where} must be a positive integer; got {rank!r:.80}."
        )
    return rank


def _scale(
    module: str, rank: int, settings: Mapping[str, Any], where: pathlib.Path
) -> float:
    alpha = _pattern("alpha_pattern", module, settings, where)
    alpha = settings.get("lora_alpha", 8) if alpha is None else alpha
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise ValueError(
            f"`lora_alpha` in {where} must be a finite number; got {alpha!r:.80}."
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
