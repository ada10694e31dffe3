"""Arrays for the shapes of a kernel's workload: full lengths, full lists, real codes.

A workload holds shapes alone. What an integer means is told by its name, which the ops
share: `lengths` are slots, an `index` names blocks, and so on.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEYS = ("keys", "k", "k_pages", "x", "a")
"""Arguments whose last but one axis is the slots of a call."""


def filled(function: Callable[..., Any], args: tuple, kwargs: dict, seed: int = 0):
    """The same arguments with arrays instead of `jax.ShapeDtypeStruct`.

    Args:
        function: the op's public function; its parameters name the arguments.
        args: positional arguments of a workload.
        kwargs: keyword arguments; what is no shape stays.
        seed: of values and lists.
    """
    names = list(inspect.signature(function).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    slots = next((given[n].shape[-2] for n in KEYS if n in given), 1)
    draw = np.random.default_rng(seed)

    def array(path, struct):
        if not isinstance(struct, jax.ShapeDtypeStruct):
            return struct
        name = str(getattr(path[-1], "name", getattr(path[-1], "key", path[-1])))
        top = given[str(getattr(path[0], "key", path[0]))]
        return _array(name, struct, slots, top, given, draw)

    flat, tree = jax.tree_util.tree_flatten_with_path(given)
    full = jax.tree.unflatten(tree, [array(path, leaf) for path, leaf in flat])
    return tuple(full[n] for n in names[: len(args)]), {n: full[n] for n in kwargs}


def _array(name, struct, slots, owner, given, draw) -> jax.Array:
    shape, dtype = struct.shape, jnp.dtype(struct.dtype)
    key = jax.random.key(int(draw.integers(1 << 31)))
    if name in ("scale", "zero"):  # small; some kernels take their bits as integers
        side = 0.02 * jax.random.uniform(key, shape, jnp.float16, 0.5, 1.5)
        same = jnp.issubdtype(dtype, jnp.floating)
        return side.astype(dtype) if same else jax.lax.bitcast_convert_type(side, dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jax.random.normal(key, shape, dtype)
    if dtype == jnp.bool_:
        return jnp.ones(shape, bool)
    if name == "codes":
        return jax.random.bits(key, shape, jnp.uint8)
    return jnp.asarray(_integers(name, shape, slots, owner, given, draw), dtype)


def _integers(name, shape, slots, owner, given, draw) -> np.ndarray:
    """What a table or a length holds, by its name."""
    if name == "index":
        return _lists(shape, -(-slots // owner.block_k), draw)
    if name == "selected":
        return _lists(shape, given["k_pages"].shape[0], draw)
    if name == "counts":  # of the lists beside them: all of every list
        lists = getattr(
            owner, "index", getattr(owner, "offsets", given.get("selected"))
        )
        return np.full(shape, lists.shape[-1])
    if name == "offsets" and hasattr(owner, "block_k"):  # diagonals
        return _lists(shape, -(-slots // owner.block_k), draw)
    if name == "offsets":
        return np.broadcast_to(np.arange(shape[-1]) * slots // (shape[-1] - 1), shape)
    if name in ("positions", "k_positions"):
        return np.broadcast_to(np.arange(shape[-1]), shape)
    tokens = given["q"].shape[-2] if "q" in given else 1
    if name == "q_positions":
        return np.broadcast_to(np.arange(slots - tokens, slots), shape)
    if name == "lengths":
        ragged = given.get("offsets")
        heads = 1 if ragged is None else ragged.shape[-1] - 1
        return np.full(shape, slots // heads)
    if name in ("kv_len", "q_start", "fill"):
        sizes = {"kv_len": slots, "q_start": slots - tokens, "fill": slots}
        return np.full(shape, sizes[name])
    raise ValueError(f"no rule fills the integers of {name!r}; give it one here.")


def _lists(shape: tuple[int, ...], among: int, draw) -> np.ndarray:
    """Sorted distinct entries below `among`, the same number in every list."""
    most = shape[-1]
    if most > among:
        raise ValueError(f"lists of {most} entries need as many blocks; got {among}.")
    # One draw per stratum: distinct, spread, and cheap for long tables.
    edge = np.arange(most + 1) * among // most
    room = edge[1:] - edge[:-1]
    return edge[:-1] + (draw.random(shape) * room).astype(np.int64)
