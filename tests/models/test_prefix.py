"""A prefix that all rows share: held once, and as if every row had read it itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import token_digest
from kvjax.compress.observe import remember
from kvjax.scorers import H2O, TOVA, SnapKV
from tests.compress.samples import draw, layer_spec
from tests.compress.test_families import model_of
from tests.small import (
    LATER,
    LENGTHS,
    PRESETS,
    ROWS,
    VOCAB,
    batch,
    one_per_structure,
    preset,
    small_model,
)

TOLERANCE = 1e-4
FRONT = 37
"""Tokens of the prefix."""


@functools.lru_cache
def front() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (1, FRONT)).astype(np.int32)


@functools.lru_cache
def prefix() -> kvjax.KVCache:
    return kvjax.prefill(small_model(), front(), max_new_tokens=4)[1]


def front_of(layers: int) -> kvjax.KVCache:
    return kvjax.prefill(small_model(layers=layers), front(), max_new_tokens=4)[1]


def pointers(parts) -> list[int]:
    """Where the arrays of some parts lie."""
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(parts)]


def numbered(tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Tokens, and their positions."""
    at = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return jnp.asarray(tokens), jnp.asarray(at, jnp.int32)


@functools.lru_cache
def whole():
    """Prefix and prompt of every row as one prompt: logits and cache."""
    prompt, _, _ = batch()
    both = np.concatenate([np.repeat(front(), ROWS, axis=0), prompt], axis=1)
    return kvjax.prefill(small_model(), both, LENGTHS + FRONT)


def test_rows_are_as_if_they_had_read_it_themselves():
    prompt, later, _ = batch()
    logits, cache = kvjax.prefill(small_model(), prompt, LENGTHS, prefix=prefix())
    wanted, other = whole()
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(cache.length, other.length)
    for layer in range(2):
        rows = zip(
            cache.kept_positions(layer), other.kept_positions(layer), strict=True
        )
        for ours, theirs in rows:
            for one, two in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(one, two)
    ours, _ = kvjax.extend(small_model(), cache, later, LATER)
    theirs, _ = kvjax.extend(small_model(), other, later, LATER)
    for row in range(ROWS):
        np.testing.assert_allclose(
            ours[row, : LATER[row]], theirs[row, : LATER[row]], atol=1e-5
        )


def test_it_is_held_once():
    prompt, later, _ = batch()
    _, cache = kvjax.prefill(small_model(), prompt, LENGTHS, prefix=prefix())
    alone = kvjax.prefill(small_model(), prompt, LENGTHS)[1]
    (group,), (given,) = cache.groups, prefix().groups
    held = sum(x.nbytes for x in jax.tree.leaves(given.parts))
    assert cache.nbytes == alone.nbytes + held
    assert pointers(group.front) == pointers(given.parts), "the very buffers"
    _, after = kvjax.extend(small_model(), cache, later[:, :5])
    made = kvjax.generate_from(
        small_model(), cache, jnp.zeros((ROWS, VOCAB)), max_new_tokens=3
    )
    for one in (after, made.cache):
        assert pointers(one.groups[0].front) == pointers(given.parts)


def test_layers_that_are_built_apart_share_one_prefix():
    """The compression splits what the prefix has together, and nothing is copied."""
    prompt, _, _ = batch()
    codes = {"type": "affine", "bits": 8, "axis": "token", "group": 32}
    store = {"keys": codes, "values": codes}
    c = kvjax.compression("knorm", layers=[{"first": 1, "stop": 3, "store": store}])
    model, held = small_model(layers=4), front_of(4)
    _, cache = kvjax.prefill(model, prompt, LENGTHS, c, prefix=held)
    assert len(cache.groups) > 1
    (given,) = held.groups
    for group in cache.groups:
        assert pointers(group.front) == pointers(given.parts)
    alone = kvjax.prefill(model, prompt, LENGTHS, c)[1]
    front_bytes = sum(x.nbytes for x in jax.tree.leaves(given.parts))
    assert cache.nbytes == alone.nbytes + front_bytes


@one_per_structure(2, 4)
def test_a_prefix_may_be_compressed(name):
    """As if each row had gone on from the compressed cache by itself."""
    c, (prompt, later, _) = preset(name), batch()
    _, held = kvjax.prefill(small_model(), prompt[:1], None, c, max_new_tokens=60)
    behind = np.minimum(LATER, 30)
    logits, _ = kvjax.prefill(small_model(), later[:, :30], behind, prefix=held)
    for row in range(ROWS):
        tokens = later[row : row + 1, : behind[row]]
        theirs, _ = kvjax.extend(small_model(), held, tokens, last=True)
        # By itself, a row encodes tails that are full before its last token.
        blocks = any(part.block for part in c.parts)
        if c.schedule.interval is None and not blocks:
            np.testing.assert_allclose(logits[row], theirs[0, 0], atol=TOLERANCE)
        assert np.isfinite(logits[row]).all()


def test_prefixes_of_prefixes():
    """Three prompts in a tree are as they are in one piece; bodies are held once."""
    prompt, later, _ = batch()
    model, tokens = small_model(), prompt[:1, :90]
    _, one = kvjax.prefill(model, tokens[:, :40])
    _, two = kvjax.prefill(model, tokens[:, 40:], prefix=one)
    logits, tree = kvjax.prefill(model, later[:, :20], prefix=two)
    both = np.concatenate([np.repeat(tokens, ROWS, axis=0), later[:, :20]], axis=1)
    wanted, _ = kvjax.prefill(model, both)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    parts = [*one.groups[0].parts, *two.groups[0].own.parts]
    assert sorted(pointers(tree.groups[0].front)) == sorted(pointers(parts))
    np.testing.assert_array_equal(tree.digest, token_digest(*numbered(both)))


SPEC, SIZE, REST = layer_spec(6, 2, 32), 20, (41, 60, 17)


@pytest.mark.sweep(2, 4)
@pytest.mark.parametrize(
    "score",
    [SnapKV(window=8), SnapKV(window=30, kernel=1), TOVA(), H2O(normalize=False)],
    ids=repr,
)
def test_scores_leave_room_for_what_is_paid_to_the_prefix(score):
    """As the scores of the whole prompt, looked up behind the prefix."""
    sample = draw(5, SPEC, tuple(SIZE + n for n in REST), width=84)
    inputs, seen = sample.inputs, jnp.asarray(sample.lengths, jnp.int32)
    counts = jnp.asarray((9, 20, 8), jnp.int32)

    @jax.jit
    def scored(inputs):
        held = inputs.held(seen)
        memory = remember(score, None, inputs, held)
        return score.score(memory, held, counts), held

    wanted, _ = scored(inputs)
    index = SIZE + jnp.broadcast_to(jnp.arange(64), (3, 64))
    asked = inputs.taken(jnp.minimum(index, 83), index < seen[:, None])
    paid = jnp.einsum(
        "BKGTD,BKSD->BKGTS",
        asked.q.reshape(3, 2, 3, 64, 32),
        inputs.k[:, :, :SIZE],
    )
    paid = jax.nn.logsumexp(paid * SPEC.scale, axis=-1).reshape(3, 6, 64)
    asked = dataclasses.replace(asked, elsewhere=paid)
    got, behind = scored(asked)
    # The border of pooling aside: in front of it lies the prefix, or nothing.
    there = np.asarray(behind.live)[:, :, 2:]
    ours, theirs = np.asarray(got)[:, :, 2:], np.asarray(wanted)[:, :, SIZE + 2 :]
    np.testing.assert_allclose(ours[there], theirs[there], rtol=1e-4)


@pytest.mark.sweep(1, 5)
@pytest.mark.parametrize("name", [x for x in PRESETS if not preset(x).probes])
def test_any_compression_behind_it(name):
    """The prompt is compressed, the prefix is not; rows are what they are alone."""
    c, (prompt, later, _) = preset(name), batch()
    logits, cache = kvjax.prefill(small_model(), prompt, LENGTHS, c, prefix=prefix())
    if c.prefill.causal:
        np.testing.assert_allclose(logits, whole()[0], atol=1e-4)
    ours, after = kvjax.extend(small_model(), cache, later, LATER)
    for layer in range(2):
        for heads in cache.kept_positions(layer):
            for head in heads:
                np.testing.assert_array_equal(head[:FRONT], np.arange(FRONT))
    row = 1
    alone = (prompt[row : row + 1, : LENGTHS[row]], LENGTHS[row : row + 1])
    _, single = kvjax.prefill(small_model(), *alone, c, prefix=prefix())
    theirs, _ = kvjax.extend(small_model(), single, later[row : row + 1])
    np.testing.assert_allclose(
        ours[row, : LATER[row]], theirs[0, : LATER[row]], atol=1e-4
    )
    assert jax.tree.structure(after) == jax.tree.structure(cache)


def test_a_window_does_not_see_all_of_it():
    """Layers with sliding windows read a prefix as far as they reach."""
    model, (prompt, later, _) = model_of("gemma3_text"), batch()
    long = np.random.default_rng(4).integers(0, VOCAB, (1, 100)).astype(np.int32)
    _, short = kvjax.prefill(model, long, max_new_tokens=4)
    logits, cache = kvjax.prefill(model, prompt, LENGTHS, prefix=short)
    both = np.concatenate([np.repeat(long, ROWS, axis=0), prompt], axis=1)
    wanted, other = kvjax.prefill(model, both, LENGTHS + 100)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    ours, _ = kvjax.extend(model, cache, later, LATER)
    theirs, _ = kvjax.extend(model, other, later, LATER)
    for row in range(ROWS):
        np.testing.assert_allclose(
            ours[row, : LATER[row]], theirs[row, : LATER[row]], atol=1e-5
        )


def test_under_jit():
    prompt, _, _ = batch()
    model = small_model()

    @jax.jit
    def run(tokens, lengths, front):
        _, held = kvjax.prefill(model, front, max_new_tokens=4)
        return kvjax.prefill(model, tokens, lengths, prefix=held)[0]

    got = run(jnp.asarray(prompt), jnp.asarray(LENGTHS), jnp.asarray(front()))
    np.testing.assert_allclose(got, whole()[0], atol=1e-5)


def refused(held, words, **fields) -> None:
    prompt, _, _ = batch()
    model = fields.pop("model", small_model())
    with pytest.raises(ValueError, match=words):
        kvjax.prefill(model, prompt, LENGTHS, prefix=held, **fields)


def test_what_is_no_prefix():
    model, tokens = small_model(), front()
    two = np.repeat(tokens, 2, axis=0)
    refused(kvjax.prefill(model, two)[1], "of one row")
    c = dataclasses.replace(preset("snapkv"), visibility="query_aware")
    refused(kvjax.prefill(model, tokens, None, c)[1], "saw a question")
    held = kvjax.prefill(model, tokens, None, c, prefix=prefix())[1]
    refused(held, "saw a question")
    refused(prefix(), "its shape differs", model=small_model(layers=3))
    refused(prefix(), "its weights differ", model=small_model(std=0.07))
    long = np.zeros((1, 1000), np.int32)
    refused(kvjax.prefill(model, long)[1], "the model's range is 1024")
