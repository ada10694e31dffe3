"""The models that come with the package, by name, and shapes of others."""

import importlib.resources
import os

from kvjax.files import yaml_mapping
from kvjax.messages import nearest, shown
from kvjax.models.config import DecoderConfig
from kvjax.models.families import read_config
from kvjax.models.gguf import is_gguf
from kvjax.models.io import load_config
from kvjax.models.published import PUBLISHED, fetched
from kvjax.places import given_path

DEFAULT = "kvjax-tiny"


def bundled_models() -> tuple[str, ...]:
    """Names of the models that are installed."""
    return tuple(
        sorted(
            entry.name
            for entry in _folder("model").iterdir()
            if (entry / "config.json").is_file()
        )
    )


def small_models() -> tuple[str, ...]:
    """Names of models that can be held in float32, in which a CPU is faster."""
    return (*bundled_models(), *PUBLISHED)


def model_directory(name: str) -> str:
    """Path of a bundled or a fetched model, or `name` as it is.

    Raises:
        ValueError: it can be fetched, and has not been.
    """
    if os.path.isdir(name):
        return name
    if (own := fetched(name)) is not None:
        return str(own)
    return str(_folder("model") / name) if name in bundled_models() else name


def shapes() -> tuple[str, ...]:
    """Hub ids of the models whose shape is known without their weights."""
    names = (entry.name for entry in _folder("shape").iterdir())
    return tuple(sorted(n.removesuffix(".yaml").replace("--", "/") for n in names))


def shape_of(name: str) -> DecoderConfig:
    """The shape of a model, without weights and without the network.

    Args:
        name: a bundled or fetched model, a directory with a `config.json`, a GGUF file,
            or an id of `shapes()`.

    Raises:
        ValueError: it is none of these.
    """
    directory = given_path(
        model_directory(name), "a model: its name, or a directory with a config.json"
    )
    if os.path.isdir(directory) or is_gguf(directory):
        return load_config(directory)
    if name not in shapes():
        raise ValueError(
            f"the shape of {shown(name)} is not known here; expected a directory with "
            f"a config.json or one of {[*bundled_models(), *shapes()]}."
            f"{nearest(name, shapes())}"
        )
    file = _folder("shape") / f"{name.replace('/', '--')}.yaml"
    return read_config(yaml_mapping(file.read_text(encoding="utf-8"), name))


def _folder(kind: str):
    return importlib.resources.files("kvjax") / "configs" / kind
