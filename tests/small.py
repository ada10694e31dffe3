"""A small decoder, and every preset at sizes that fit it; no preset is named here."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.compress.config import Compression
from kvjax.compress.survey import survey
from kvjax.config import shortened
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.config import Evictor, Projection, read_gates
from kvjax.models.evictor import with_evictor
from kvjax.models.projection import with_projection
from kvjax.rope import Rope
from kvjax.scorers import AbstractScorer

VOCAB = 61
MANY = 512
"""Vocabulary without repeated tokens in a row: in the first layer their keys would be
of one length but for rounding, and `knorm` would choose among them by chance."""
HEAD_DIM = 32


@functools.lru_cache
def preset(name: str) -> Compression:
    """A preset at test size.

    Where its ranges leave none of two layers as the preset itself says, the last ones
    are left out.
    """
    c = shortened(kvjax.compression(name))
    while all(any(some.holds(layer, 2) for some in c.layers) for layer in range(2)):
        c = dataclasses.replace(c, layers=c.layers[:-1])
    return c


PRESETS = kvjax.compressions()
BUDGETED = tuple(
    name
    for name in PRESETS
    if preset(name).schedule.interval is None
    and (preset(name).evict is not None or preset(name).keep is not None)
)
SCORES: dict[str, AbstractScorer] = {}
"""Scores of presets that need no second pass, each by the first preset that has it."""
for _name in PRESETS:
    for _score in preset(_name).scores:
        if not _score.probes and _score not in SCORES.values():
            SCORES[_name] = _score


def gates(layers: int, kv_heads: int) -> tuple[tuple[float, ...], ...]:
    """Gates of which every second one is high, no two of them alike."""
    wide = np.arange(layers * kv_heads).reshape(layers, kv_heads) / 100
    high = np.indices((layers, kv_heads)).sum(axis=0) % 2
    return read_gates(0.6 * high + wide)


@functools.lru_cache
def small_model(
    dtype: str = "float32", std: float = 0.08, layers: int = 2, vocab: int = VOCAB
) -> Decoder:
    """Random weights, grouped queries, and logits that compression really changes.

    It has an evictor, a projection and gates, which compressions that do not ask for
    them ignore.
    """
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        rope=Rope(head_dim=HEAD_DIM),
        max_positions=1024,
        init_std=std,
        head_gates=gates(layers, 2),
    )
    model = Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    model = with_evictor(model, Evictor(kind="mlp", hidden=16))
    model = with_projection(model, Projection())
    rng = np.random.default_rng(0)
    sides = [getattr(model.layers.attention, f"{s}_basis") for s in Projection().sides]
    for layer in range(layers):
        for basis in sides:
            noise = jnp.asarray(rng.standard_normal(basis.shape[1:]), basis.dtype)
            basis[...] = basis[...].at[layer].set(noise)
    return model


ROWS, WIDTH = 3, 112
LENGTHS = np.array([112, 75, 97], np.int32)
LATER = np.array([41, 50, 36], np.int32)


@functools.lru_cache
def batch(vocab: int = VOCAB) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ragged prompts `[B, T]`, their continuations `[B, N]`, and both in one row.

    Of a vocabulary that is large enough, no token comes twice in a row.
    """
    rng = np.random.default_rng(0)
    width = int((LENGTHS + LATER).max())
    whole = rng.integers(0, vocab, (ROWS, width)).astype(np.int32)
    if vocab >= width:
        whole = rng.permuted(np.tile(np.arange(vocab, dtype="i4"), (ROWS, 1)), axis=1)
        whole = whole[:, :width]
    prompt, later = whole[:, :WIDTH].copy(), np.zeros((ROWS, LATER.max()), np.int32)
    for row in range(ROWS):
        prompt[row, LENGTHS[row] :] = 0
        later[row, : LATER[row]] = whole[row, LENGTHS[row] :][: LATER[row]]
    return prompt, later, whole


def structure(name: str) -> tuple[Any, ...]:
    """What the tree of a preset's cache depends on; a test holds it."""
    c = preset(name)
    specs, lengths = small_model().config.layers, jnp.asarray(LENGTHS)
    layouts = survey(c, specs, lengths, WIDTH, jnp.dtype("float32")).layouts
    pooled = any(layout.pooled for layout in layouts)
    split = c.evict is not None and c.evict.values is not None
    later = c.schedule.interval is not None
    tracked = type(c.evict.score) if later and c.evict is not None else None
    return pooled, split, c.store, c.read, c.layers, tracked


REPRESENTATIVE = {structure(name): name for name in reversed(PRESETS)}
"""The first preset of each structure."""


def one_per_structure(fast: int, ci: int | None = None):
    """Cases of a test of what depends on the cache alone.

    A preset of each structure, of which `make test` takes `fast` and `.ci/run` `ci`
    (None: all) and one other preset.
    """
    chosen = list(REPRESENTATIVE.values())
    marks = [pytest.mark.sweep(fast, ci or len(chosen), kind="structure")]
    others = [pytest.mark.sweep(0, 1)]
    return pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=marks if n in chosen else others) for n in PRESETS],
    )


def assert_forms_agree(model: Decoder, c: Compression, flips: bool = False) -> None:
    """`simulate` gives the logits of teacher forcing through the real cache.

    With `flips` a rounding before a code may turn out the other way, which moves the
    logits behind it by no more than one code does (docs/log.md, 2026-11-21).
    """
    prompt, later, whole = batch(model.config.vocab_size)
    total = LENGTHS + LATER
    first, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=64)
    real, _ = kvjax.extend(model, cache, later, LATER)
    logits = np.asarray(kvjax.simulate(model, whole, total, LENGTHS, c))
    for row, n in enumerate(LENGTHS):
        after = slice(n, total[row])
        np.testing.assert_allclose(logits[row, n - 1], first[row], atol=1e-4)
        ours, theirs = logits[row, after], np.asarray(real[row, : LATER[row]])
        if flips:
            far = np.abs(ours - theirs)
            assert np.median(far) < 1e-4 and far.max() < 5e-3
            continue
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
