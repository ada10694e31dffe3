"""A prompt that is read in chunks, and compressed behind each (`every_chunk`)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.compress.chunks import in_chunks
from kvjax.compress.config import Compression
from kvjax.compress.survey import survey
from kvjax.models import chunked_prefill
from kvjax.schedules import EveryChunk
from kvjax.types import LayerInputs
from tests.small import (
    LATER,
    LENGTHS,
    MANY,
    PRESETS,
    ROWS,
    WIDTH,
    assert_forms_agree,
    batch,
    preset,
    small_model,
)
from tests.typecheck import wrong_types

SIZE = 32


def in_pieces(c: Compression, size: int = SIZE) -> Compression | None:
    """The same behind every chunk; None where it needs a whole prompt."""
    schedule = EveryChunk(size=size, interval=c.schedule.interval)
    try:
        return dataclasses.replace(c, schedule=schedule)
    except ValueError:
        return None


CHUNKED = tuple(name for name in PRESETS if in_pieces(preset(name)) is not None)
"""Presets that can be repeated behind every chunk."""
EVERY = pytest.mark.parametrize("name", CHUNKED)
KEEP_ALL = tuple(
    name
    for name in CHUNKED
    if preset(name).store.plain and preset(name).schedule.interval is None
)


def chunked(name: str, size: int = SIZE) -> Compression:
    c = in_pieces(preset(name), size)
    assert c is not None
    return c


def test_most_presets_can():
    """What cannot says so: it needs a whole prompt, or all layers at once."""
    left = set(PRESETS) - set(CHUNKED)
    for name in left:
        with pytest.raises(ValueError, match="every_chunk|schedule.size"):
            dataclasses.replace(preset(name), schedule=EveryChunk(size=SIZE))
    assert len(left) < len(CHUNKED)


@pytest.mark.sweep(4, 20)
@EVERY
def test_two_forms_agree(name):
    model, c = small_model(vocab=MANY), chunked(name)
    assert_forms_agree(model, c, flips=not c.store.plain)


@functools.lru_cache
def whole(name: str):
    prompt, later, _ = batch()
    given = (small_model(), prompt, LENGTHS, preset(name))
    logits, cache = kvjax.prefill(*given, max_new_tokens=64)
    return logits, kvjax.extend(small_model(), cache, later, LATER)[0]


@pytest.mark.sweep(2, 5)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[("none", size) for size in (8, 48, 64, 500)],
        *[(name, size) for name in ("quest", "exact_topk") for size in (16, 48, 512)],
    ],
)
def test_without_compression_it_is_the_whole_prompt(name, size):
    prompt, later, _ = batch()
    model, c = small_model(), chunked(name, size)
    logits, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=64)
    np.testing.assert_allclose(logits, whole(name)[0], atol=1e-4)
    after, _ = kvjax.extend(model, cache, later, LATER)
    for row, n in enumerate(LATER):
        ours, theirs = after[row, :n], whole(name)[1][row, :n]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.sweep(2, 12)
@pytest.mark.parametrize("name", KEEP_ALL)
def test_a_budget_of_all_is_the_whole_prompt(name):
    c = chunked(name)
    if not c.has_budget:
        return
    prompt, _, _ = batch()
    c = c.with_keep(1.0)
    logits, cache = kvjax.prefill(small_model(), prompt, LENGTHS, c)
    np.testing.assert_allclose(logits, whole("none")[0], atol=1e-4)
    for row, n in enumerate(LENGTHS):
        for layer in range(cache.num_layers):
            for kept in cache.kept_positions(layer)[row]:
                np.testing.assert_array_equal(kept, np.arange(n))


@pytest.mark.sweep(2, 8)
@EVERY
def test_a_row_is_what_it_is_alone(name):
    prompt, later, _ = batch()
    model, c, row = small_model(), chunked(name), 1
    _, both = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=64)
    _, alone = kvjax.prefill(
        model, prompt[row : row + 1, : LENGTHS[row]], None, c, max_new_tokens=64
    )
    for layer in range(both.num_layers):
        ours, theirs = (x.kept_positions(layer) for x in (both, alone))
        for one, other in zip(ours[row], theirs[0], strict=True):
            np.testing.assert_array_equal(one, other)
    n = LATER[row]
    ours, _ = kvjax.extend(model, both, later, LATER)
    theirs, _ = kvjax.extend(model, alone, later[row : row + 1, :n])
    np.testing.assert_allclose(ours[row, :n], theirs[0], atol=1e-4)


@pytest.mark.parametrize("name", ["knorm", "streaming_llm"])
def test_scores_of_keys_alone_keep_the_same_however_long_the_chunks(name):
    """Of one layer's keys, and the best of all of them by a plain sort."""
    draw = np.random.default_rng(0)
    specs = small_model().config.layers
    spec = dataclasses.replace(specs[0], num_layers=1)
    k, v = draw.standard_normal((2, ROWS, spec.num_kv_heads, WIDTH, spec.head_dim))
    q = draw.standard_normal((ROWS, spec.num_heads, WIDTH, spec.head_dim))
    inside = np.arange(WIDTH) < LENGTHS[:, None]
    positions = np.where(inside, np.arange(WIDTH), -1).astype("i4")
    prompt = LayerInputs(
        q=jnp.asarray(q, jnp.float32),
        k=jnp.asarray(k, jnp.float32),
        v=jnp.asarray(v, jnp.float32),
        positions=jnp.asarray(positions),
        o_proj=jnp.zeros((spec.num_heads, spec.head_dim, 8)),
        spec=spec,
    )
    lengths = jnp.asarray(LENGTHS)
    for size in (8, 40, WIDTH):
        c = chunked(name, size)
        found = survey(c, (spec,), lengths, WIDTH, jnp.dtype("float32"))
        share = found.share
        _, held = in_chunks(prompt, lengths, found.layouts[0], share, size)
        for row, n in enumerate(LENGTHS):
            count = int(share.held[0, row])
            for head in range(spec.num_kv_heads):
                scores = -np.linalg.norm(k[row, head, :n], axis=-1)
                if name == "streaming_llm":
                    scores = np.where(np.arange(n) < 4, np.inf, np.arange(n))
                best = np.sort(np.argsort(-scores, kind="stable")[:count])
                assert held.positions is not None
                mine = np.asarray(held.positions[row, head])
                np.testing.assert_array_equal(np.sort(mine[mine >= 0]), best)


def test_memory_does_not_grow_with_the_prompt():
    """The one program of all chunks, and the one that closes, at 16 and 256 chunks."""
    c = kvjax.compression(
        "knorm", **{"evict.budget.slots": 48, "schedule": "every_chunk"}
    )
    c = dataclasses.replace(c, schedule=EveryChunk(size=64))
    model = small_model()

    def chunking(tokens: int):
        layers = (model.config.layers, tokens, model.dtype)
        return chunked_prefill.Chunking.of(c, *layers, longest=tokens, room=64)

    assert chunking(16 * 64) == chunking(256 * 64)  # static: one program for both


def test_one_program_for_all_chunks():
    prompt, _, _ = batch()
    model, c = small_model(), chunked("knorm", 16)
    chunked_prefill._read.clear_cache()  # type: ignore[attr-defined]
    kvjax.prefill(model, prompt, LENGTHS, c)
    assert chunked_prefill._read._cache_size() == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["knorm", "none"])
def test_it_works_under_jit(name):
    prompt, later, _ = batch()
    model, c = small_model(), chunked(name)

    @jax.jit
    def run(prompt, lengths):
        logits, cache = kvjax.prefill(model, prompt, lengths, c, max_new_tokens=64)
        return logits, kvjax.extend(model, cache, later)[0]

    logits, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=64)
    traced = run(jnp.asarray(prompt), jnp.asarray(LENGTHS))
    np.testing.assert_allclose(traced[0], logits, atol=1e-4)
    after, _ = kvjax.extend(model, cache, later)
    np.testing.assert_allclose(traced[1], after, atol=1e-4)


@pytest.mark.parametrize("name", ["knorm", "snapkv", "h2o"])
def test_behind_a_prefix(name):
    """A budget of all behind a prefix is the whole text; scores see what it takes."""
    prompt, _, _ = batch()
    model, c = small_model(), chunked(name).with_keep(1.0)
    front = np.random.default_rng(1).integers(0, 61, (1, 24), "i4")
    _, held = kvjax.prefill(model, front, max_new_tokens=4)
    logits, cache = kvjax.prefill(model, prompt, LENGTHS, c, prefix=held)
    both = np.concatenate([np.tile(front, (ROWS, 1)), prompt], axis=1)
    wanted, _ = kvjax.prefill(model, both, LENGTHS + 24)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    np.testing.assert_array_equal(cache.length, LENGTHS + 24)


def test_generation_and_forks_go_on_from_it():
    prompt, _, _ = batch()
    c = chunked("knorm")
    one = kvjax.generate(small_model(), prompt[:1], None, c, max_new_tokens=8)
    logits, cache = kvjax.prefill(small_model(), prompt[:1], None, c)
    rows = cache.fork(2)
    both = jnp.tile(logits, (2, 1))
    two = kvjax.generate_from(small_model(), rows, both, max_new_tokens=8)
    np.testing.assert_array_equal(two.tokens[0], one.tokens[0])
    np.testing.assert_array_equal(two.tokens[1], one.tokens[0])


def test_it_may_go_on_evicting():
    """The budget and the tail, however many tokens are decoded."""
    prompt, later, _ = batch()
    schedule = EveryChunk(size=32, interval=4)
    c = dataclasses.replace(preset("knorm").with_keep(0.25), schedule=schedule)
    _, cache = kvjax.prefill(small_model(), prompt, LENGTHS, c, max_new_tokens=4)
    _, after = kvjax.extend(small_model(), cache, later)
    assert after.nbytes == cache.nbytes


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("snapkv", {"schedule.size": 32}, "protects 64 tokens, more than a chunk of 32"),
    ("kivi_4bit", {"schedule.size": 100}, "must be a multiple of 128"),
    ("infllm", {}, "InfLLM looks at all of it"),
    ("shadowkv", {"store.keys": {"type": "affine"}}, "ShadowKV looks at tokens as"),
    ("lowrank_keys", {}, "LowRank encodes what it has seen whole"),
    ("think", {}, "encodes what it has seen whole"),
    ("kvzip", {"evict.budget": {"type": "uniform", "keep": 0.5}}, "KVzip reads it"),
    ("chunkkv", {}, "Chunk with reuse=.*use token"),
    ("cake", {}, "compares all layers"),
    ("decoupled", {}, r"evict\.values"),
    ("vertical_slash", {}, "prefill=VerticalSlash.*prefill=dense"),
]


@pytest.mark.parametrize(("name", "fields", "said"), REFUSED)
def test_what_needs_a_whole_prompt_is_refused(name, fields, said):
    fields = {"schedule": {"type": "every_chunk"}} | fields
    with pytest.raises(ValueError, match=said):
        kvjax.compression(name, **fields)


@wrong_types
def test_reading_once_for_many_budgets_is_refused():
    from kvjax.models.prompts import read_prompt

    with pytest.raises(ValueError, match="Use kvjax.prefill, once for every budget"):
        read_prompt(small_model(), batch()[0], LENGTHS, chunked("knorm"))
