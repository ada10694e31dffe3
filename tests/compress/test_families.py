"""Every preset with every family."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.compress.config import Compression
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.config import Evictor, Projection
from kvjax.models.families import FAMILIES
from kvjax.rope import Rope
from tests.small import (
    LATER,
    LENGTHS,
    PRESETS,
    ROWS,
    VOCAB,
    assert_forms_agree,
    batch,
    gates,
    preset,
)

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "rope": Rope(head_dim=32),
    "max_positions": 512,
    "init_std": 0.08,
    "head_gates": gates(2, 2),
}

DIFFERENCES = {
    "llama": {
        "rope": Rope(head_dim=32, kind="llama3", factor=4.0, original_max_positions=128)
    },
    "mistral": {"windows": (64, 64)},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True},
    "phi3": {"rope": Rope(head_dim=32, rotary_dim=16)},
    "gemma3_text": {
        "windows": (48, None),
        "local_rope": Rope(head_dim=32, theta=10_000.0),
        "rope": Rope(head_dim=32, theta=1e6, kind="linear", factor=8.0),
        "qk_norm": True,
        "norm_offset": True,
        "post_norms": True,
        "embedding_scale": 48**0.5,
        "attention_scale": 24**-0.5,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "final_softcap": 30.0,
    },
}
"""What tells a family's decoder from the plain one, sliding windows included."""


@functools.lru_cache
def model_of(family: str, name: str = "none") -> Decoder:
    """A random decoder whose vectors are random too, with what some presets ask for.

    Norms that begin as ones leave every normalised key with the same length, and then
    a method that ranks keys by length chooses among rounding errors.
    """
    c = preset(name)
    asks = c.evict is not None and c.evict.score.needs_retention
    evictor = Evictor(kind="neuron", gain=2.0, offset=0.5) if asks else None
    fields = {**SHAPE, "family": family, **DIFFERENCES[family], "evictor": evictor}
    config = DecoderConfig(**fields, projection=Projection())
    model = Decoder(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def disturb(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape, np.float32)
        stacked = path[0].key == "layers"  # behind an axis for the layers
        return leaf + noise if leaf.ndim - stacked == 1 else leaf

    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map_with_path(disturb, params))
    return model


def test_every_family_is_here():
    assert set(DIFFERENCES) == set(FAMILIES)


@pytest.mark.sweep(2, 6)
@pytest.mark.parametrize("family", DIFFERENCES)
@pytest.mark.parametrize("name", PRESETS)
def test_two_forms_agree(family, name):
    """Prompts are longer than the windows; one reply is longer than Gemma's."""
    c = preset(name)
    coded = any(codec.coded for codec in c.store.codecs)
    assert_forms_agree(model_of(family, name), c, flips=coded)


SLIDING = [
    family for family, change in DIFFERENCES.items() if any(change.get("windows", ()))
]


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("family", SLIDING)
@pytest.mark.parametrize("name", PRESETS)
def test_windows_hide_what_left_them(family, name):
    """Nothing behind the window is attended, and rows are what they are alone."""
    model, c = model_of(family, name), preset(name)
    prompt, later, _ = batch()
    _, cache = kvjax.prefill(model, prompt, LENGTHS, c)
    logits, _ = kvjax.extend(model, cache, later, LATER)
    _, alone = kvjax.prefill(model, prompt[1:2, : LENGTHS[1]], None, c)
    single, _ = kvjax.extend(model, alone, later[1:2, : LATER[1]])
    np.testing.assert_allclose(logits[1, : LATER[1]], single[0], atol=1e-4)


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_layers_hold_their_window_only(family):
    """Uncompressed: bytes are freed, and no logit changes."""
    model = model_of(family)
    prompt, later, _ = batch()
    _, cache = kvjax.prefill(model, prompt, LENGTHS)
    pairs = zip(model.config.layers, cache.layers, strict=True)
    for index, (spec, layer) in enumerate(pairs):
        if spec.window is None:
            continue
        for row, n in zip(cache.kept_positions(index), LENGTHS, strict=True):
            for kept in row:
                np.testing.assert_array_equal(kept, np.arange(n - spec.window, n))
        assert layer.parts[0].positions.shape[-1] == spec.window
    logits, _ = kvjax.extend(model, cache, later, LATER)
    _, _, whole = batch()
    full = kvjax.simulate(model, whole, LENGTHS + LATER, LENGTHS, Compression())
    for row in range(ROWS):
        n, m = LENGTHS[row], LATER[row]
        np.testing.assert_allclose(logits[row, :m], full[row, n : n + m], atol=1e-4)
