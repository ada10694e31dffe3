"""The models that come with the package, by name."""

import importlib.resources
import pathlib

DEFAULT = "kvjax-tiny"


def bundled_models() -> tuple[str, ...]:
    """Names of the models that are installed."""
    return tuple(
        sorted(
            entry.name
            for entry in _folder().iterdir()
            if (entry / "config.json").is_file()
        )
    )


def model_directory(name: str) -> str:
    """Path of a bundled model, or `name` as it is."""
    if name not in bundled_models() or pathlib.Path(name).is_dir():
        return name
    return str(_folder() / name)


def _folder():
    return importlib.resources.files("kvjax") / "configs" / "model"
