"""The caches and the sparse prefill go through the ops that `pallas_kernels` tunes."""

import numpy as np
import pytest

import kvjax
from kvjax.pallas_kernels.dispatch import Op
from tests.small import LATER, LENGTHS, batch, preset, small_model


@pytest.fixture
def ops(monkeypatch) -> set[str]:
    """Names of the ops that are called, when a program is traced."""
    called = set()
    run = Op.__call__

    def noted(self, *args, **kwargs):
        called.add(self.name)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Op, "__call__", noted)
    return called


@pytest.mark.sweep(3, 99)
@pytest.mark.parametrize(
    ("name", "prefill", "decode"),
    [
        ("none", set(), {"decode_attention"}),
        ("snapkv", {"column_stats"}, {"decode_attention"}),
        ("adakv_snapkv", {"column_stats"}, {"decode_attention"}),
        ("kivi_2bit", {"quantize_pack"}, {"decode_attention"}),
        ("quest", {"page_summary"}, {"page_score", "paged_decode"}),
        ("vertical_slash", {"column_stats", "sparse_prefill"}, {"decode_attention"}),
        ("xattention", {"block_score", "sparse_prefill"}, {"decode_attention"}),
    ],
)
def test_ops_serve_the_library(name, prefill, decode, ops):
    prompt, later, _ = batch()
    c = preset(name)
    model = small_model()
    # A room of its own: no program that another test has compiled serves this call.
    room = 67 + len(name)
    _, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=room)
    assert prefill <= ops
    ops.clear()
    few = np.minimum(LATER, 1)
    logits, _ = kvjax.extend(model, cache, later[:, :1], few)
    assert np.isfinite(np.asarray(logits)[few > 0]).all()
    assert decode <= ops
