"""Recipes as files: bundled ones and a user's own, decoded strictly; and back."""

import dataclasses
import importlib.resources
import importlib.resources.abc
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.config import decode, override, parse_assignments
from kvjax.files import MOST_YAML, read_text, yaml_mapping
from kvjax.messages import nearest, shown
from kvjax.train.recipe.config import TrainConfig

INPUTS = "inputs"
"""Key of a run's `recipe.yaml` under which it keeps digests of what it reads."""


def _folder() -> importlib.resources.abc.Traversable:
    return importlib.resources.files("kvjax") / "configs" / "train"


def bundled_recipes() -> list[str]:
    """Names of `configs/train/`."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir())


def load_config(name: str | pathlib.Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A bundled recipe of `configs/train/` or a YAML file, some fields changed.

    Args:
        name: bundled name, or path to a `.yaml` file.
        overrides: `dotted.path=value`, the value in YAML.

    Raises:
        ValueError: no such recipe, unknown key (the nearest is named) or a value of a
            wrong type.
    """
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml"):
        text = read_text(path, MOST_YAML)
    else:
        known = bundled_recipes()
        if str(name) not in known:
            raise ValueError(
                f"Unknown recipe {shown(str(name))}; expected one of {known} or a path "
                f"to a .yaml file.{nearest(str(name), known)}"
            )
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    tree = yaml_mapping(text, f"recipe {shown(str(name))}")
    try:
        return decode_recipe(tree, overrides)
    except ValueError as wrong:
        raise ValueError(f"recipe {shown(str(name))}: {wrong}") from None


def decode_recipe(
    tree: Mapping[Any, Any], overrides: Sequence[str] = ()
) -> TrainConfig:
    """`tree` as a recipe, without what a run keeps beside it in `recipe.yaml`.

    Raises:
        ValueError: see `load_config`.
    """
    fields = {key: value for key, value in tree.items() if key != INPUTS}
    return decode(override(fields, parse_assignments(overrides)), TrainConfig)


def as_tree(config: TrainConfig) -> Any:
    """All fields of a recipe, as YAML and JSON have them."""
    return _plain(dataclasses.asdict(config))


def _plain(tree: Any) -> Any:
    """Mappings and lists, as YAML has them."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return tree
