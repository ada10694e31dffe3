"""Random models made by transformers, and what transformers computes with them."""

import dataclasses
import os
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


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """A published model, or a skip; continuous integration fetches it, once.

    It is kept in `KVJAX_CACHE_DIR` or, without one, below the checkout.
    """
    pytest.importorskip("gguf", reason="no gguf: pip install kvjax[gguf]")
    from kvjax.models.fetching import fetch

    root = pathlib.Path(__file__).resolve().parents[2]
    cache = os.environ.get("KVJAX_CACHE_DIR") or root / ".cache" / "kvjax"
    place = pathlib.Path(cache).absolute() / "models" / "smollm2"
    if not (place / "config.json").is_file() and "CI" not in os.environ:
        pytest.skip(f"no SmolLM2 in {place}: `kvjax fetch smollm2 --out` it there")
    try:
        return fetch("smollm2", origin="index", out=place).directory
    except (ValueError, OSError) as wrong:
        pytest.skip(f"SmolLM2 cannot be had: {wrong}")


def story_directory() -> pathlib.Path:
    """The small trained model beside the checkout; it need not exist."""
    root = pathlib.Path(__file__).resolve().parents[2]
    return root.parent / "shared" / "data" / "models" / "stories260k"
