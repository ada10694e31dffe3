"""`adapter_config.json` of PEFT's LoRA: what it says of updates, what is refused."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from kvjax.fields import Count, Positive
from kvjax.files import read_json
from kvjax.messages import shown
from kvjax.models.families.settings import Settings

_LAYER = re.compile(r".*\.[^.]*\.(\d+)\.")
_REPEATED_GROUP, _QUANTIFIERS, _LONGEST = re.compile(r"\)[*+?{]"), "*+?{", 300
# Flags, which are read by their type.
_FLAGS = ("use_rslora", "use_dora", "lora_bias")
REMEDY = (
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


def refuse(what: str, where: pathlib.Path) -> NoReturn:
    """More than LoRA is not read."""
    raise ValueError(
        f"{where} is more than LoRA updates of matrices: {what} is not read. {REMEDY}"
    )


@dataclasses.dataclass(frozen=True)
class Lora:
    """What `adapter_config.json` says of its updates."""

    r: int
    alpha: float
    ranks: Mapping[re.Pattern[str], int]
    alphas: Mapping[re.Pattern[str], float]
    root: bool
    """Whether updates are divided by the root of their rank (rsLoRA)."""
    layers: tuple[int, ...] | None
    """The only layers with updates; None: any."""
    without: tuple[str, ...] | re.Pattern[str]
    """Modules without updates: whole names and ends of names, or a pattern."""

    def rank(self, module: str) -> int:
        return _own(self.ranks, module, self.r)

    def scale(self, module: str) -> float:
        rank, alpha = self.rank(module), _own(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)

    def excludes(self, module: str) -> str:
        """Why PEFT gives a module no updates, as it decides; empty if it may have."""
        if isinstance(self.without, re.Pattern):
            left_out = self.without.fullmatch(module) is not None
        else:
            left_out = any(f".{module}".endswith(f".{one}") for one in self.without)
        if left_out:
            return "`exclude_modules`"
        found = _LAYER.match(module)
        if self.layers is not None and (not found or int(found[1]) not in self.layers):
            return f"`layers_to_transform` {shown(list(self.layers))}"
        return ""


def read_lora(where: pathlib.Path) -> Lora:
    """What an `adapter_config.json` says.

    Raises:
        ValueError: a setting of another type, or one that is more than plain LoRA.
    """
    raw = read_json(where)
    settings = Settings(raw, {"r": 8, "lora_alpha": 8})
    _check_plain(raw, where)
    for name in ("use_dora", "lora_bias"):
        if typed(settings, name, bool, where, False):
            refuse(f"`{name}`", where)
    ranks = typed(settings, "rank_pattern", dict[str, Positive], where, {})
    alphas = typed(settings, "alpha_pattern", dict[str, float], where, {})
    return Lora(
        r=typed(settings, "r", Positive, where),
        alpha=typed(settings, "lora_alpha", float, where),
        ranks={_pattern(p, "rank_pattern", where): v for p, v in ranks.items()},
        alphas={_pattern(p, "alpha_pattern", where): v for p, v in alphas.items()},
        root=typed(settings, "use_rslora", bool, where, False),
        layers=_layers(settings, where),
        without=_without(settings, where),
    )


def _layers(settings: Settings, where: pathlib.Path) -> tuple[int, ...] | None:
    """`layers_to_transform`; none of them if `layers_pattern` names other lists."""
    names = settings.values.get("layers_pattern") or ()
    hint = str if isinstance(names, str) else tuple[str, ...]
    names = typed(settings, "layers_pattern", hint, where, ())
    names = (names,) if isinstance(names, str) else names
    given = settings.values.get("layers_to_transform")
    hint = tuple[Count, ...] if isinstance(given, list) else Count
    layers = typed(settings, "layers_to_transform", hint, where, None)
    if layers is None or layers == ():
        return None
    known = [_compiled(name, "layers_pattern", where, name) for name in names if name]
    if known and not any(pattern.fullmatch("layers") for pattern in known):
        return ()
    return layers if isinstance(layers, tuple) else (layers,)


def _without(
    settings: Settings, where: pathlib.Path
) -> tuple[str, ...] | re.Pattern[str]:
    given = settings.values.get("exclude_modules")
    if isinstance(given, str) and given:
        given = typed(settings, "exclude_modules", str, where)
        return _compiled(given, "exclude_modules", where, given)
    hint = str if given == "" else tuple[str, ...]
    return tuple(typed(settings, "exclude_modules", hint, where, ()))


def typed(
    settings: Settings, name: str, hint: Any, where: pathlib.Path, *default: Any
) -> Any:
    """`settings.get`, whose message names the file."""
    try:
        return settings.get(name, hint, *default)
    except ValueError as wrong:
        raise ValueError(f"{where}: {str(wrong):.600}") from None


def _check_plain(settings: Mapping[str, Any], where: pathlib.Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{where} has `peft_type` {kind!r:.40}; only 'LORA' is read. {REMEDY}"
        )
    others = [name for name in settings if name.startswith("use_")]
    for name in (*_OTHER, *others):
        if settings.get(name) and name not in _FLAGS:
            refuse(f"`{name[:80]}` ({str(settings[name]):.80})", where)
    if settings.get("bias", "none") not in ("none", None):
        refuse(f"`bias` {settings['bias']!r:.40}", where)
    start = settings.get("init_lora_weights")
    if not any(type(start) is type(one) and start == one for one in _STARTS):
        refuse(f"`init_lora_weights` {start!r:.40}, which changes the base,", where)


def _pattern(pattern: str, name: str, where: pathlib.Path) -> re.Pattern[str]:
    """A key of `rank_pattern` or `alpha_pattern` as PEFT matches it."""
    return _compiled(pattern, name, where, rf"(.*\.)?({pattern})$")


def _compiled(
    pattern: str, name: str, where: pathlib.Path, whole: str
) -> re.Pattern[str]:
    """A pattern that a file names, as `whole` has it, if it can be matched in time."""
    said = f"`{name}` in {where} has {pattern!r:.80}"
    # Python looks for a match by trying: what may repeat in many ways takes for ever.
    quantifiers = sum(pattern.count(one) for one in _QUANTIFIERS)
    if quantifiers > 2 or len(pattern) > _LONGEST or _REPEATED_GROUP.search(pattern):
        raise ValueError(
            f"{said}; at most {_LONGEST} characters with two of {_QUANTIFIERS!r} and "
            "no repeated group are read. Name the modules one by one."
        )
    try:
        return re.compile(whole)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{said}, which is no regular expression: {error}.") from None


def _own[T](table: Mapping[re.Pattern[str], T], module: str, default: T) -> T:
    """A module's own entry: the first whose pattern fits, as in PEFT."""
    return next((value for key, value in table.items() if key.match(module)), default)
