"""Merges with their references, and what a cache holds of merged tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.budgets import Uniform
from kvjax.cache import AbstractMerge, Ragged, Slots
from kvjax.compress.config import Compression, Eviction
from kvjax.merges import D2O, CaM
from kvjax.scorers import H2O
from kvjax.types import LayerSpec
from tests.compress.samples import SPECS, Sample
from tests.reference import merging

RECENT, RECEIVERS = 4, 5
SPEC = SPECS["d16_g2"]
ROPE = SPEC.rope  # none of the codecs here looks at it
Reference = Callable[..., tuple[np.ndarray, np.ndarray]]
"""`(k, v, received, kept, positions, spec)` of one row to its keys and values."""


def cam(k, v, received, kept, positions, spec) -> tuple[np.ndarray, np.ndarray]:
    del spec
    given = (v, received, kept)
    return k, merging.cam_values(*given, positions=positions, budget=RECEIVERS)


def d2o(k, v, received, kept, positions, spec: LayerSpec):
    del received
    turned = {"positions": positions, "frequencies": spec.rope.frequencies()}
    return merging.d2o_merge(k, v, kept, **turned)[:2]


CASES: dict[str, tuple[AbstractMerge, Reference]] = {
    "cam": (CaM(receivers=RECEIVERS), cam),
    "d2o": (D2O(), d2o),
}


def with_nan(sample: Sample) -> Sample:
    """The same with NaN in padding."""
    dead = (sample.inputs.positions < 0)[:, None, :, None]
    fields = {
        name: jnp.where(dead, jnp.nan, getattr(sample.inputs, name)) for name in "qkv"
    }
    inputs = dataclasses.replace(sample.inputs, **fields)
    return dataclasses.replace(sample, inputs=inputs)


def compression(name: str, **fields) -> Compression:
    """H2O with a window, merged."""
    given: dict[str, Any] = {"budget": Uniform(keep=0.4)} | fields
    more = {key: given.pop(key) for key in ("store", "schedule") if key in given}
    score = H2O(normalize=False, recent=RECENT)
    return Compression(
        evict=Eviction(score=score, merge=CASES[name][0], **given), **more
    )


def row_of(sample: Sample, row: int, n: int) -> list[np.ndarray]:
    """`q, k, v` of the first `n` tokens of a row."""
    arrays = (sample.inputs.q, sample.inputs.k, sample.inputs.v)
    return [np.asarray(x, np.float64)[row, :, :n] for x in arrays]


def by_head(part: Slots | Ragged, row: int, head: int):
    """Positions, keys and values of a head, in order."""
    k, v = (x.decode(part.positions, ROPE) for x in (part.keys, part.values))
    at: Any = (row, head)
    if isinstance(part, Ragged):
        start, end = np.asarray(part.offsets)[row, head : head + 2]
        at = (row, slice(start, end))
    positions, k, v = (np.asarray(x)[at] for x in (part.positions, k, v))
    order = np.argsort(positions, kind="stable")
    order = order[positions[order] >= 0]
    return positions[order], k[order], v[order]
