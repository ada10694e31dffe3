"""Validation shared by the ops' public functions: argument, got, expected."""

from typing import Any

import jax.numpy as jnp

FLOATS = ("float32", "bfloat16", "float16")


def shape(name: str, array: Any, expected: tuple[int | str, ...], **sizes: int) -> None:
    """Refuse an array that has not the expected shape.

    Args:
        name: of the argument.
        array: anything with a `shape`.
        expected: a size, or the name of one (`"B"`), per axis.
        sizes: the named sizes that are fixed already; other names fit any size.
    """
    want = tuple(sizes.get(n, n) if isinstance(n, str) else n for n in expected)
    got = tuple(array.shape)
    fits = len(got) == len(want) and all(
        isinstance(w, str) or g == w for g, w in zip(got, want, strict=True)
    )
    if not fits:
        names = ", ".join(map(str, expected))
        sizes_text = ", ".join(map(str, want))
        raise ValueError(
            f"`{name}` must be [{names}] = [{sizes_text}]; got {list(got)}."
        )


def dtype(name: str, array: Any, allowed: tuple[str, ...] = FLOATS) -> None:
    """Refuse an array of another dtype."""
    got = jnp.dtype(array.dtype).name
    if got not in allowed:
        raise ValueError(
            f"`{name}` must have dtype {' or '.join(allowed)}; got {got}. Convert it "
            "before the call."
        )


def integers(name: str, array: Any) -> None:
    """Refuse an array that does not hold int32."""
    dtype(name, array, ("int32",))


def group(heads: int, kv_heads: int) -> int:
    """Query heads per KV head, or a `ValueError`."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"`q` must have a multiple of the KV heads; got {heads} query heads and "
            f"{kv_heads} KV heads."
        )
    return heads // kv_heads
