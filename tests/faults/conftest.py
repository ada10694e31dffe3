"""Small checkpoints to damage, and bounds of time and memory for every test."""

import pathlib
import resource
import shutil
import signal
from collections.abc import Iterator

import pytest

from kvjax.models import save
from kvjax.models import weights as weights_module
from tests.models.samples import sample

FAST, SLOW, MEMORY = 60, 900, 4 * 2**30


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> pathlib.Path:
    """A small Llama in one file, and one in shards."""
    folder = tmp_path_factory.mktemp("saved")
    save(sample("llama"), folder / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "SHARD_BYTES", 20_000)
        save(sample("llama"), folder / "many")
    return folder


@pytest.fixture
def one(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved / "one", tmp_path / "one")


@pytest.fixture
def many(saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(saved / "many", tmp_path / "many")


@pytest.fixture(autouse=True)
def bounded(request) -> Iterator[None]:
    """Nothing here waits for ever, or takes more than 4 GB: each test is cut off."""

    seconds = SLOW if request.node.get_closest_marker("slow") else FAST

    def late(*_: object) -> None:
        raise AssertionError(f"this took more than {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = pathlib.Path("/proc/self/statm")
    if pages.is_file():
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
