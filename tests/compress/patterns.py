"""Sizes, tokens and masks for tests of sparse patterns of prefill."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.prefills import PREFILLS, AbstractPattern, Dense
from tests.compress.samples import Sample, draw, layer_spec
from tests.reference import prefilling

LENGTHS, WIDTH = (150, 97, 41, 150), 160
SPECS = {
    "full": layer_spec(4, 2, 16),
    "window": layer_spec(6, 2, 16, window=70),
    "softcap": layer_spec(4, 4, 16, softcap=2.0),
}


def fixed(mask: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A mask that does not look at what it masks."""

    def of(q, k, *, window=None, **how):
        (heads, n, _), at = q.shape, np.indices((q.shape[1],) * 2)
        near = at[0] - at[1] < (window or n)
        return np.repeat(mask(n, **how) & near, heads, axis=0)

    return of


PATTERNS: dict[str, tuple[str, dict[str, Any], Callable[..., np.ndarray]]] = {
    "a_shape": (
        "a_shape",
        {"first": 5, "local": 19},
        fixed(prefilling.a_shape_mask),
    ),
    "tri_shape": (
        "tri_shape",
        {"first": 9, "local": 24, "last": 20},
        fixed(prefilling.tri_shape_mask),
    ),
    "block_topk": ("block_topk", {"blocks": 3}, prefilling.block_topk_mask),
    "xattention": (
        "xattention",
        {"threshold": 0.6, "stride": 4},
        prefilling.xattention_mask,
    ),
    "flex_lines": (
        "flex_prefill",
        {"gamma": 0.5, "tau": 0.0, "least": 8},
        prefilling.flex_prefill_mask,
    ),
    "flex_most": (
        "flex_prefill",
        {"gamma": 0.9, "tau": 0.0, "least": 8, "most": 30},
        prefilling.flex_prefill_mask,
    ),
    "flex_means": (
        "flex_prefill",
        {"gamma": 0.43, "tau": 1.0, "least": 16},
        prefilling.flex_prefill_mask,
    ),
}
SPARSE: dict[str, Callable[..., AbstractPattern]] = {
    name: cls for name, cls in PREFILLS.items() if issubclass(cls, AbstractPattern)
}


def small(name: str) -> dict[str, Any]:
    """Sizes for a hundred tokens."""
    if name == "vertical_slash":
        sizes = {"vertical": 9, "slash": 3, "last_q": 8, "first": 2, "local": 1}
        return sizes
    if name == "by_head":
        others = ("vertical_slash", "a_shape", "xattention")
        patterns = [SPARSE[one](block=16, **small(one)) for one in others]
        return {"patterns": (*patterns, Dense()), "table": ((0, 1, 2, 3),)}
    found = (fields for kind, fields, _ in PATTERNS.values() if kind == name)
    return next(found)


def made(name: str, block: int = 16, dense_below: int = 0) -> AbstractPattern:
    """A pattern of these sizes."""
    kind, fields, _ = PATTERNS[name]
    given = fields | {"block": block, "dense_below": dense_below}
    return SPARSE[kind](**given)


def peaked(seed: int, spec, lengths=LENGTHS, width=WIDTH) -> Sample:
    """Tokens among which some are asked for more than others, padding NaN."""
    sample = draw(seed, spec, lengths, width)
    rng = np.random.default_rng(seed)
    loud = rng.choice([0.6, 3.0], p=[0.9, 0.1], size=(1, spec.num_kv_heads, width, 1))
    live = (sample.inputs.positions >= 0)[:, None, :, None]
    k = jnp.where(live, sample.inputs.k * loud, jnp.nan)
    q, v = (jnp.where(live, x, jnp.nan) for x in (sample.inputs.q, sample.inputs.v))
    inputs = dataclasses.replace(sample.inputs, q=q, k=k.astype(jnp.float32), v=v)
    return Sample(inputs=inputs, lengths=sample.lengths)


@functools.partial(jax.jit, static_argnums=(0, 3))
def attend(prefill, inputs, lengths, mass=False, past=None):
    return prefill.attend(inputs, lengths, mass, past)


def weights(sample: Sample, row: int, mask: np.ndarray) -> np.ndarray:
    """Softmax weights `[H, n, n]` of a row under a mask."""
    (q, k, _), spec = sample.row(row), sample.inputs.spec
    k = np.repeat(k, spec.groups, axis=0)
    logits = np.einsum("hid,hjd->hij", q, k) * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    logits = np.where(mask, logits, -np.inf)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def seen_by_hand(prefill, inputs, lengths) -> np.ndarray:
    """Pairs of tokens of one row that a choice contains, `[H, n, n]`."""
    chosen = jax.jit(prefill.choose)(inputs, lengths)
    n, block = inputs.positions.shape[1], prefill.block
    at, key = np.indices((n, n))
    mask = np.zeros((inputs.q.shape[1], n, n), bool)
    if chosen.blocks is not None:
        mask |= np.asarray(chosen.blocks)[0][:, at // block, key // block]
    if chosen.diagonals is not None:
        offset = np.maximum(at // block - key // block, 0)
        mask |= np.asarray(chosen.diagonals)[0][:, offset]
    if chosen.columns is not None:
        mask |= np.asarray(chosen.columns)[0][:, key]
    return mask & (key <= at)
