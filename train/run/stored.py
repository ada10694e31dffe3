"""What a checkpoint is: names, sums over bits, metadata; what is said of a failure."""

import contextlib
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, UInt32
from orbax.checkpoint import v1 as ocp

from kvjax.files import is_full, read_text

STEP = re.compile(r"step_(\d+)")
DIGESTS = "digests"


def steps_in(directory: pathlib.Path) -> list[int]:
    """The steps of which `directory` has a complete checkpoint, ascending."""
    found = (STEP.fullmatch(path.name) for path in directory.glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


def path_of(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The checkpoint of one step."""
    return directory.absolute() / f"step_{step}"


def named(state: Any) -> dict[str, Array]:
    """The leaves of a state by their paths, `opt_state.1.0.mu.layers.mlp.up.kernel`.

    Names outlive what numbers do not: an optimizer state that gains or loses a leaf.
    """
    flat, _ = jax.tree.flatten_with_path(state)
    pairs = [(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in flat]
    return dict(pairs)


Sums = tuple[UInt32[Array, "N"], Bool[Array, "N"]]


def sums(leaves: Sequence[Array]) -> Sums:
    """Of each leaf, the sum of its bits as whole numbers, and whether it is finite.

    Whole on every device that holds the leaves, however these are split.
    """
    return _summing(whole(leaves[0].sharding))(leaves)


def whole(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """A copy on each device of a mesh; None for one device."""
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec())


@functools.cache
def _summing(where: Any) -> Callable[[Sequence[Array]], Sums]:
    return jax.jit(_sums, out_shardings=where)


def _sums(leaves: Sequence[Array]) -> Sums:
    def bits(x: Array) -> Array:
        if x.dtype == jnp.bool_:
            return x.astype(jnp.uint32)
        size = min(8 * x.dtype.itemsize, 32)
        return jax.lax.bitcast_convert_type(x, f"uint{size}").astype(jnp.uint32)

    finite = [
        jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(1)
        for x in leaves
    ]
    sums = [bits(x).sum(dtype=jnp.uint32) for x in leaves]
    return jnp.stack(sums), jnp.stack(finite)


def not_finite(state: Any) -> list[str]:
    """Names of the leaves that hold NaN or infinity."""
    leaves = named(state)
    _, finite = sums(list(leaves.values()))
    return [n for n, ok in zip(leaves, np.asarray(finite), strict=True) if not ok]


def metadata(path: pathlib.Path) -> dict[str, Any]:
    """Shapes and dtypes of a checkpoint's leaves; raises where it is damaged."""
    held: Any = ocp.metadata(str(path))
    if None in (held.commit_timestamp_nsecs, held.metadata):  # orbax makes that of it
        raise ValueError("its metadata cannot be read")
    # orbax opens no directory in which one of these is damaged, and has no reader.
    metrics = path / "metrics" / "metrics"
    if metrics.exists():
        json.loads(read_text(metrics))
    return held.metadata


def cause(wrong: BaseException) -> Exception:
    """What went wrong at first, below the layers that passed it on."""
    while wrong.__cause__ is not None:
        wrong = wrong.__cause__
    return wrong if isinstance(wrong, Exception) else ValueError(str(wrong))


def short(why: Exception) -> str:
    """One line of an error."""
    return f"{type(why).__name__}: {why}".splitlines()[0][:200]


def unwritten(
    what: str, path: pathlib.Path, wrong: Exception, checkpoints: pathlib.Path
) -> OSError:
    """What could not be written where and why, what is kept, and what to do.

    Args:
        what: as the message names it.
        path: where it should have gone.
        wrong: what the writer raised.
        checkpoints: the directory of the run's.
    """
    why = cause(wrong)
    names = ", ".join(f"step_{step}" for step in steps_in(checkpoints)) or "none yet"
    return OSError(
        f"{what} could not be written to {path} ({short(why)}). Complete checkpoints "
        f"are kept: {names}. {'Free some space' if is_full(why) else 'Fix that'} and "
        "give the same command again."
    )


@contextlib.contextmanager
def writing(what: str, path: pathlib.Path, checkpoints: pathlib.Path) -> Iterator[None]:
    """While inside, what fails to be written is told as by `unwritten`."""
    try:
        yield
    except Exception as wrong:
        why = cause(wrong)
        if isinstance(why, OSError) or is_full(why):
            raise unwritten(what, path, wrong, checkpoints) from wrong
        raise
