"""A kernel on every device of a mesh, each for its rows and its KV heads."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from kvjax import axes

ROWS, HEADS = frozenset({"batch"}), frozenset({"kv_heads"})
"""Along these nothing is exchanged; slots of a cache are merged by who holds them."""


def mapped(
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    gives: Sequence[str],
    *args: Any,
) -> Any:
    """`kernel(*args)` under `shard_map` over the mesh of the trace.

    Args:
        kernel: of one device.
        plain: returns the same shapes, and is not run.
        gives: letters of the arrays that come back.
        args: a record of arguments with annotated fields, or arrays `[B, K, ...]`.

    Raises:
        NotImplementedError: arrays have other leading axes than rows and heads.
    """
    mesh = axes.mesh()
    assert mesh is not None
    given = [item for arg in args for item in _lettered(arg)]
    # KV heads that do not divide keep query heads together, which would.
    heads = [
        axes.spec_of(x, letters, HEADS)[letters.index("K")]
        for x, letters in given
        if "K" in letters
    ]
    among = ROWS | HEADS if heads and None not in heads else ROWS
    specs = [axes.spec_of(x, letters, among) for x, letters in given]
    found, tree = jax.tree.flatten(jax.eval_shape(plain, *args))
    back = [
        axes.spec_of(x, _expanded(letters.split(), x.ndim), among)
        # An op may leave out the last ones: statistics that were not asked for.
        for x, letters in zip(found, gives, strict=False)
    ]
    run = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=jax.tree.unflatten(jax.tree.structure(args), specs),
        out_specs=jax.tree.unflatten(tree, back),
        check_vma=False,  # kernels say nothing of what varies over the mesh
    )
    return run(*args)


def _lettered(held: Any) -> Iterator[tuple[Any, list[str]]]:
    """The arrays of an argument, in order, each with the letters of its axes."""
    if not dataclasses.is_dataclass(held):
        yield from ((leaf, ["B", "K"]) for leaf in jax.tree.leaves(held))
        return
    for field in dataclasses.fields(held):
        value = getattr(held, field.name)
        if field.metadata.get("static") or value is None:
            continue
        if dataclasses.is_dataclass(value):
            yield from _lettered(value)
            continue
        words = getattr(field.type, "dim_str", "").split()
        if "*lead" in words:
            yield value, _expanded(words, value.ndim)
        else:
            yield value, axes.letters_of(field.type, value.ndim)


def _expanded(letters: Sequence[str], rank: int) -> list[str]:
    """Letters of all axes, with `*lead` spelt out."""
    if letters[0] != "*lead":
        return list(letters)
    count = rank - len(letters) + 1
    if count not in (1, 2):
        raise NotImplementedError(
            "over several devices arrays are of rows, or of rows and heads; got "
            f"{count} axes in front of the slots."
        )
    return [*("B", "K")[:count], *letters[1:]]
