"""Shared fixtures, and the settings that every test runs under.

The environment is set before JAX is imported: CPU only; compiled programs kept in
`.cache/jax`, so that a second run does not compile again; and little optimisation,
since a test compiles for longer than it runs. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` asks
for all of it, as `make test-all` does; modules marked `optimized` always have it.
"""

import gc
import os
import pathlib
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
# A bounded cache is locked, so that processes can share it.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# It also looks at all its entries to add one: only programs that are worth it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Mosaic's GPU interpreter runs compiled code from a callback: with one thread in XLA's
# pool, which a machine or a process of one core has, it would wait for itself.
if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2:
    os.environ.setdefault("NPROC", "2")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jax.typing import DTypeLike  # noqa: E402

import tests.typecheck  # noqa: E402, F401
from tests.levels import (  # noqa: E402, F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_report_header,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)
from tests.workers import pytest_xdist_make_scheduler  # noqa: E402, F401

# KVJAX_TYPECHECK=1 checks shapes and types at each call; this has to come before any
# module of kvjax is imported.
if os.environ.get("KVJAX_TYPECHECK", "0") != "0":
    jaxtyping.install_import_hook("kvjax", "tests.typecheck.checked")

jax.config.update("jax_numpy_dtype_promotion", "strict")

TOLERANCE = {
    jnp.dtype("float32"): {"rtol": 1e-5, "atol": 1e-5},
    jnp.dtype("bfloat16"): {"rtol": 2e-2, "atol": 2e-2},
    jnp.dtype("float16"): {"rtol": 2e-3, "atol": 2e-3},
}
"""What two ways of computing one thing may differ by.

Loosening an entry needs a line in CHANGELOG.md.
"""


@pytest.fixture(autouse=True, scope="module")
def _compiler(request):
    """Optimise as the module asks for, and free what it compiled.

    With the programs of the whole suite in one process, XLA's CPU compiler once
    crashed (docs/log.md).
    """
    little = jax.config.read("jax_disable_most_optimizations")
    if request.node.get_closest_marker("optimized") is not None:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", little)
    jax.clear_caches()
    gc.collect()


MAPS = pathlib.Path("/proc/self/maps")
MANY = 30_000
"""Maps of memory with which programs are freed, wherever a module ends.

Each program is several; one test has made 7,000. A process of Linux has 65,530, and XLA
crashes where there is none left.
"""

_looked = time.monotonic()


def pytest_runtest_teardown() -> None:
    """Free programs in long modules, too; counting takes up to 40 ms."""
    global _looked
    if time.monotonic() - _looked < 1 or not MAPS.exists():
        return
    if MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()
    _looked = time.monotonic()


@pytest.fixture(scope="session")
def repo() -> pathlib.Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Weights, text and evaluation sets beside the checkout, or a skip."""
    path = pathlib.Path(os.environ.get("KVJAX_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no shared data: set KVJAX_DATA to a folder with models/ and lm/")
    return path


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function that gives a new PRNG key at each call, the same in every run."""
    count = iter(range(1 << 30))
    root = jax.random.key(20261121)
    return lambda: jax.random.fold_in(root, next(count))


@pytest.fixture(scope="session")
def tolerance() -> Callable[[DTypeLike], dict[str, float]]:
    """`rtol` and `atol` for a dtype, for `numpy.testing.assert_allclose`."""
    return lambda dtype: TOLERANCE[jnp.dtype(dtype)]
