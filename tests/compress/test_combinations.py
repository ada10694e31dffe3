"""Methods that no preset combines: their two forms agree, or they are refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Pages
from kvjax.codecs import AffineArray
from kvjax.pallas_kernels.quantize_pack import dequantize
from tests.compress.samples import SPECS, compressed, decode_inputs, draw, prefix
from tests.small import HEAD_DIM, LENGTHS, assert_forms_agree, batch, small_model

PAGES = {"type": "quest", "page": 8, "keep": 0.5}
CODES = {
    "store.keys": {"type": "affine", "bits": 4, "axis": "channel", "group": 8},
    "store.values": {"type": "affine", "bits": 4, "axis": "token", "group": 32},
}
HALF = {"score": {"type": "knorm"}, "budget": {"type": "uniform", "keep": 0.5}}
WINDOW = {"evict.score.window": 8}
STEEP = {"evict.budget.beta": 2.0, "evict.budget.window": 8}

SLOT_BYTES = 2 * 2 * (4 + 2 * 4 * HEAD_DIM)
"""Of a slot in both heads of both layers, with its position."""


def every(interval: int) -> dict[str, Any]:
    """A body of 24 slots that evicts while tokens are decoded."""
    schedule = {"type": "every_tokens", "interval": interval}
    return {"evict.budget.slots": 24, "schedule": schedule}


COMBINATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tova+every4": ("tova", every(4)),
    "tova+every1": ("tova", every(1)),
    "knorm+every4": ("knorm", every(4)),
    "streaming+every4": ("streaming_llm", every(4)),
    "pyramid+every4": ("pyramidkv", WINDOW | every(4) | STEEP),
    "snapkv+quest": ("snapkv", WINDOW | {"evict.budget.keep": 0.5, "read": PAGES}),
    "quest+codes": ("quest", CODES | {"read": PAGES, "store.residual": 16}),
    "knorm+quest+codes": ("knorm", CODES | {"evict.budget.keep": 0.5, "read": PAGES}),
    "chunks+codes": ("chunkkv", WINDOW | CODES),
    "chunks+codes+residual": ("chunkkv", WINDOW | CODES | {"store.residual": 16}),
    "ada+codes": ("adakv_snapkv", WINDOW | CODES),
    "lowrank+knorm": ("lowrank_keys", {"evict": HALF}),
}


@pytest.mark.sweep(1, 5)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_two_forms_agree(name):
    preset, fields = COMBINATIONS[name]
    assert_forms_agree(small_model(), kvjax.compression(preset, **fields))


@pytest.mark.parametrize("budget", [{"slots": 24}, {"bytes": 24 * SLOT_BYTES}])
def test_a_pyramid_stays_one_while_it_decodes(budget):
    """And a prompt that is shorter than its body leaves room in it."""
    prompt, later, _ = batch()
    budget = {"type": "pyramid", "beta": 2.0, "window": 8, **budget}
    fields = WINDOW | {"evict.budget": budget, "schedule": every(1)["schedule"]}
    c = kvjax.compression("pyramidkv", **fields)
    _, cache = kvjax.prefill(small_model(), prompt[:, :20], LENGTHS * 0 + 20, c)
    _, cache = kvjax.extend(small_model(), cache, later)
    held = [[len(h) for h in cache.kept_positions(layer)[0]] for layer in range(2)]
    assert held == [[36, 36], [12, 12]]


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize("turn", [None, 1])
def test_pages_of_codes_that_no_kernel_reads(monkeypatch, turn):
    """Only the pages that are read are decoded: the same numbers."""
    whole, lengths = draw(1, SPECS["d32_g3"], (76, 49, 62)), np.array([75, 48, 61])
    c = kvjax.compression("quest", **CODES, read=PAGES)
    cache = compressed(prefix(whole, lengths), c, layer=2)
    (part,) = cache.parts
    assert isinstance(part, Pages)
    if turn is not None:  # that of the second of two layers
        part = jax.tree.map(lambda x: jnp.stack([jnp.ones_like(x), x]), part)
    asked = decode_inputs(whole, lengths, 0)

    def attend():
        given = (asked.q, asked.positions, cache.spec, None, turn)
        return jax.jit(lambda part: part.attend(*given))(part)

    want, stored, seen = attend(), AffineArray.stored.fget, []
    assert stored is not None

    def decode(self, *_):
        seen.append(self.slots)
        return dequantize(stored(self), self.dtype)

    monkeypatch.setattr(AffineArray, "stored", None)
    monkeypatch.setattr(AffineArray, "decode", decode)
    found = attend()
    assert set(seen) == {part.most * part.page} and part.most < part.low.shape[-2]
    np.testing.assert_allclose(found.out, want.out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.lse, want.lse, rtol=1e-5, atol=1e-5)
