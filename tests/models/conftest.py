"""Random models made by transformers, and what transformers computes with them."""

import dataclasses
import pathlib

import numpy as np
import pytest

from tests.torch_env import find_torch_python, run_reference

MODULES = ("torch", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True)
class Reference:
    """Model directories and the arrays of `tests/torch_reference.py`."""

    folder: pathlib.Path
    arrays: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]


def run_torch(folder: pathlib.Path, *args: object) -> dict[str, np.ndarray]:
    """Arrays of one run of the reference script."""
    out = folder / "reference.npz"
    run_reference("torch_reference.py", out, *map(str, args), modules=MODULES)
    with np.load(out) as file:
        return dict(file)


@pytest.fixture(scope="session")
def torch_python() -> str:
    """The interpreter with PyTorch, or a skip."""
    python, reason = find_torch_python(MODULES)
    if python is None:
        pytest.skip(reason)
    return python


@pytest.fixture(scope="session")
def reference(torch_python, tmp_path_factory) -> Reference:
    """All cases, made and run in one process."""
    del torch_python
    folder = tmp_path_factory.mktemp("reference")
    story = story_directory()
    args = ["--make", folder] + (["--story", story] if story.is_dir() else [])
    return Reference(folder, run_torch(folder, *args))


def story_directory() -> pathlib.Path:
    """The small trained model beside the checkout; it need not exist."""
    root = pathlib.Path(__file__).resolve().parents[2]
    return root.parent / "shared" / "data" / "models" / "stories260k"
