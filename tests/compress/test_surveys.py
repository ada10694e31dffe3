"""Layers that share all slots by what is found in them, through a whole model."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.budgets import BUDGETS, Uniform
from kvjax.cache import LayerCache, Ragged
from kvjax.compress.config import Compression, LayerRange
from kvjax.depth import members
from kvjax.models import Decoder, generation, prompts
from kvjax.models.simulate import surveyed
from kvjax.types import nbytes
from tests.compress.test_families import model_of
from tests.small import (
    LENGTHS,
    PRESETS,
    assert_forms_agree,
    batch,
    preset,
    small_model,
)

SHARING = [
    name
    for name in PRESETS
    if (evict := preset(name).evict) is not None and evict.budget.surveys
]
GIVEN = pytest.mark.parametrize("name", SHARING)


def test_there_is_something_to_test():
    """By the registry, so that a new budget is in all of this."""
    kinds = {type(preset(name).evict.budget) for name in SHARING}  # type: ignore
    assert kinds and kinds == {kind for kind in BUDGETS.values() if kind.surveys}


def settings_of(name: str, **fields) -> Compression:
    """A preset with fields of its budget replaced."""
    c = preset(name)
    assert c.evict is not None
    budget = dataclasses.replace(c.evict.budget, **fields)
    return dataclasses.replace(c, evict=dataclasses.replace(c.evict, budget=budget))


def uniform(c: Compression) -> Compression:
    """The same with the same in all layers and heads."""
    assert c.evict is not None
    budget = Uniform(keep=c.evict.budget.keep)
    return dataclasses.replace(c, evict=dataclasses.replace(c.evict, budget=budget))


def held(cache: kvjax.KVCache) -> np.ndarray:
    """Tokens that are held, `[L, B, K]`."""
    return np.array(
        [
            [[len(head) for head in row] for row in cache.kept_positions(layer)]
            for layer in range(cache.num_layers)
        ]
    )


@functools.lru_cache
def deep() -> Decoder:
    """Enough layers for a limit to be felt, the sharper in their attention the deeper.

    Random layers are so alike that some methods give all of them the same.
    """
    model = nnx.clone(small_model(layers=6))
    kernel = model.layers.attention.q.kernel
    sharper = jnp.linspace(1.0, 12.0, 6).reshape(-1, 1, 1)
    kernel[...] = kernel[...] * sharper
    return model


@pytest.mark.sweep(1, 4)
@GIVEN
@pytest.mark.parametrize("keep", [0.25, 0.4])
def test_the_cache_is_as_large_as_a_uniform_one(name, keep):
    c, (prompt, _, _) = settings_of(name, keep=keep), batch()
    _, ours = kvjax.prefill(deep(), prompt, LENGTHS, c)
    _, theirs = kvjax.prefill(deep(), prompt, LENGTHS, uniform(c))
    counts, even = held(ours), held(theirs)
    np.testing.assert_array_equal(counts.sum(axis=(0, 2)), even.sum(axis=(0, 2)))
    assert np.ptp(counts.sum(axis=2), axis=0).min() > 0  # layers do differ
    assert ours.nbytes == nbytes(jax.tree.leaves(ours))
    assert abs(ours.nbytes - theirs.nbytes) < 0.01 * theirs.nbytes


@pytest.mark.sweep(1, 3)
@GIVEN
def test_no_head_is_above_its_limit(name):
    c, (prompt, _, _) = settings_of(name, most=1.25, keep=0.3), batch()
    _, cache = kvjax.prefill(deep(), prompt, LENGTHS, c)
    mean = -(-3 * LENGTHS // 10)
    counts, limit = held(cache), 5 * mean // 4
    np.testing.assert_array_equal(counts.sum(axis=(0, 2)), 2 * 6 * mean)
    assert (counts <= limit[:, None]).all()
    assert (counts == limit[:, None]).any()


@pytest.mark.sweep(1, 2)
@GIVEN
def test_both_forms_agree_in_many_layers(name):
    assert_forms_agree(deep(), preset(name))


@pytest.mark.sweep(0, 2)
@GIVEN
def test_codes_in_pieces_that_start_anywhere(name):
    """Groups of 32 slots along a buffer whose pieces depend on the data."""
    codes = {"type": "affine", "bits": 8, "axis": "channel", "group": 32}
    c = settings_of(name, keep=0.28)  # two groups per layer, a few more or less
    prompt, _, _ = batch()
    _, plain = kvjax.prefill(deep(), prompt, LENGTHS, c)
    store = kvjax.compression("none", **{"store.keys": codes, "store.values": codes})
    c = dataclasses.replace(c, store=store.store)
    _, cache = kvjax.prefill(deep(), prompt, LENGTHS, c)
    (group,) = cache.groups
    (part,) = group.parts
    assert isinstance(part, Ragged)
    offsets = np.asarray(part.offsets)
    assert (offsets[:, :, 0] % 32 == 0).all()
    assert (np.diff(offsets[:, :, 0], 2, axis=0) != 0).any()  # not evenly spaced
    np.testing.assert_array_equal(held(cache), held(plain))
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        for mine, other in zip(decoded(ours), decoded(theirs), strict=True):
            assert np.abs(mine - other).max() <= np.ptp(other) / 255
    assert_forms_agree(deep(), c, flips=True)


def decoded(layer: LayerCache) -> Iterator[np.ndarray]:
    """Keys and values of a layer's heads, row by row."""
    (part,) = layer.parts
    assert isinstance(part, Ragged)
    for row, edges in enumerate(np.asarray(part.offsets)):
        for side in (part.keys, part.values):
            whole = np.asarray(side.decode(part.positions, layer.spec.rope))
            yield whole[row, edges[0] : edges[-1]]


@functools.lru_cache
def plain_cache(name: str) -> kvjax.KVCache:
    prompt, _, _ = batch()
    return kvjax.prefill(deep(), prompt, LENGTHS, preset(name))[1]


@GIVEN
def test_layers_by_themselves_are_those_of_the_buffer(name):
    """`KVCache.layers` cuts pieces that begin elsewhere in every row."""
    cache = plain_cache(name)
    for number, layer in enumerate(cache.layers):
        whole = cache.kept_positions(number)
        for ours, theirs in zip(layer.parts[0].live_positions(), whole, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.sweep(0, 2)
@GIVEN
def test_under_jit(name):
    """Traced tokens and lengths: the same tokens, the same logits."""
    graph, params = nnx.split(deep())
    prompt, later, _ = batch()

    @jax.jit
    def run(params, tokens, lengths, more):
        model = nnx.merge(graph, params)
        _, cache = kvjax.prefill(model, tokens, lengths, preset(name))
        return cache, kvjax.extend(model, cache, more)[0]

    cache, logits = run(params, prompt, LENGTHS, later[:, :1])
    np.testing.assert_array_equal(held(cache), held(plain_cache(name)))
    want, _ = kvjax.extend(deep(), plain_cache(name), later[:, :1])
    np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.sweep(1, 2)
@GIVEN
def test_rows_alone(name):
    prompt, _, _ = batch()
    for row, n in enumerate(LENGTHS):
        _, alone = kvjax.prefill(deep(), prompt[row : row + 1, :n], None, preset(name))
        for layer in range(6):
            ours = plain_cache(name).kept_positions(layer)[row]
            for one, other in zip(ours, alone.kept_positions(layer)[0], strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.sweep(0, 2)
@GIVEN
def test_one_prompt_read_once(name):
    """Compressed later to any budget: what `prefill` gives."""
    prompt, _, _ = batch()
    read = prompts.read_prompt(deep(), prompt, LENGTHS, preset(name))
    for keep in (0.25, 0.5):
        c = preset(name).with_keep(keep)
        cache = read.compress(c)
        _, want = kvjax.prefill(deep(), prompt, LENGTHS, c)
        np.testing.assert_array_equal(held(cache), held(want))


@pytest.mark.sweep(0, 2)
@GIVEN
def test_other_data_is_no_other_program(name):
    """Pieces differ, arrays do not: one compilation of the loop that decodes."""
    prompt, _, _ = batch()
    run = functools.partial(kvjax.generate, c=preset(name), max_new_tokens=8)
    first = run(deep(), prompt, LENGTHS).cache
    loops = generation._decode_donating._cache_size()  # type: ignore[attr-defined]
    second = run(deep(), prompt[::-1].copy() + 0, LENGTHS[::-1].copy() - 1).cache
    assert generation._decode_donating._cache_size() == loops  # type: ignore
    assert not np.array_equal(held(first), held(second))


@pytest.mark.sweep(0, 2)
@GIVEN
def test_windows_hold_what_they_see(name):
    """Layers share with their kind; one with a window holds no more than that."""
    model, c = model_of("gemma3_text"), settings_of(name, keep=0.6)
    prompt, _, _ = batch()
    _, cache = kvjax.prefill(model, prompt, LENGTHS, c)
    counts = held(cache)
    mean = -(-3 * LENGTHS // 5)
    np.testing.assert_array_equal(counts[1].sum(axis=-1), 2 * mean)
    np.testing.assert_array_equal(counts[0].sum(axis=-1), 2 * np.minimum(mean, 48))
    assert counts[0].max() == 48
    for row, n in enumerate(LENGTHS):
        for head in cache.kept_positions(0)[row]:
            assert head.min() >= n - 48


@pytest.mark.sweep(0, 2)
@GIVEN
def test_layers_with_another_rule_beside_them(name):
    """Ranges of layers: buffers of both kinds, each with what is its own."""
    other = preset("adakv_snapkv")
    ranges = (LayerRange(first=2, stop=4, evict=other.evict),)
    c = dataclasses.replace(preset(name), layers=ranges)
    prompt, _, _ = batch()
    _, cache = kvjax.prefill(deep(), prompt, LENGTHS, c)
    counts, mean = held(cache), -(-LENGTHS // 4)
    np.testing.assert_array_equal(counts[2:4].sum(axis=2), [2 * mean] * 2)
    for group in members(cache.loops):
        mine = counts[np.array(group)].sum(axis=(0, 2))
        np.testing.assert_array_equal(mine, 2 * len(group) * mean)
    assert_forms_agree(deep(), c)


@pytest.mark.sweep(0, 2)
@GIVEN
def test_layers_that_reuse_a_choice(name):
    """Each takes its own number of the tokens that the layer before it ranked."""
    c = preset(name)
    assert c.evict is not None
    unit = dataclasses.replace(c.evict.unit, reuse=2)
    c = dataclasses.replace(c, evict=dataclasses.replace(c.evict, unit=unit))
    prompt, _, _ = batch()
    _, cache = kvjax.prefill(deep(), prompt, LENGTHS, c)
    counts = held(cache)
    mean = -(-LENGTHS // 4)
    np.testing.assert_array_equal(counts.sum(axis=(0, 2)), 2 * 6 * mean)
    for first in range(0, 6, 2):
        pair = [cache.kept_positions(layer) for layer in (first, first + 1)]
        for row in range(len(LENGTHS)):
            for one, other in zip(pair[0][row], pair[1][row], strict=True):
                common = np.intersect1d(one, other)
                assert len(common) == min(len(one), len(other))
    assert_forms_agree(deep(), c)


@pytest.mark.sweep(1, 2)
@GIVEN
def test_both_forms_give_heads_the_same(name):
    """The pass in front of the parallel form is given whole rows, and sees prompts."""
    model, c = deep(), preset(name)
    _, _, whole = batch()
    found = surveyed(model, jnp.asarray(LENGTHS), jnp.asarray(whole), c)
    heads = found.share.heads
    assert heads is not None
    np.testing.assert_array_equal(heads, held(plain_cache(name)))


@GIVEN
def test_what_sharing_excludes(name):
    with pytest.raises(ValueError, match="Use single tokens"):
        kvjax.compression(name, **{"evict.unit": "chunk"})
    with pytest.raises(ValueError, match="the same slots in every head"):
        kvjax.compression(name, **{"schedule": "every_tokens"})
