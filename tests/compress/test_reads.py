"""What holds for every read that chooses, driven by the registry."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import AbstractSelecting, LayerCache, Slots
from kvjax.codecs import PlainArray
from kvjax.compress.config import Compression
from kvjax.config import shortened
from kvjax.pallas_kernels.partial import Partial, merge
from kvjax.reads import READS, AbstractBudgeted, AbstractRead
from kvjax.types import EMPTY, LayerInputs, LayerSpec
from tests.compress.samples import compressed, draw, layer_spec, prefix
from tests.small import LENGTHS as PROMPTS
from tests.small import batch, small_model

CHOOSING: dict[str, AbstractRead] = {
    name: shortened(cls()) for name, cls in READS.items() if not cls.whole
}
"""Every read that does not read everything, at sizes for short prompts."""
EVERY = pytest.mark.parametrize("name", CHOOSING)
LENGTHS = np.array([93, 64, 77])
LATER = 3
SPECS: dict[str, LayerSpec] = {
    "plain": layer_spec(4, 2, 16),
    "window and cap": layer_spec(4, 2, 16, window=70, softcap=3.0),
}
GIVEN_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@functools.lru_cache
def held(name: str, spec: LayerSpec, keep: float) -> tuple[LayerCache, LayerInputs]:
    """A cache of prompts, and three queries behind each of them."""
    read = CHOOSING[name].with_keep(keep)
    whole = draw(5, spec, tuple(LENGTHS + LATER))
    # A window would drop what it does not see before anything is read.
    plain = dataclasses.replace(spec, window=None)
    sample = prefix(whole, LENGTHS)
    given = dataclasses.replace(sample.inputs, spec=plain)
    sample = dataclasses.replace(sample, inputs=given)
    cache = compressed(sample, Compression(read=read))
    at = jnp.asarray(LENGTHS[:, None] + np.arange(LATER), jnp.int32)
    asked = whole.inputs.taken(at, jnp.ones(at.shape, bool))
    return dataclasses.replace(cache, spec=spec), asked


@jax.jit
def attended(cache: LayerCache, q, positions) -> Partial:
    parts = (*cache.parts, cache.tail)
    return merge([part.attend(q, positions, cache.spec) for part in parts])


@jax.jit
def chosen(cache: LayerCache, q, positions) -> tuple[jax.Array, ...]:
    """Slots `[B, K, T, S]` that queries read of the parts that choose."""
    given = (q, positions, cache.spec)
    parts = [part for part in cache.parts if isinstance(part, AbstractSelecting)]
    return tuple(part.chosen(*given) for part in parts)


def visible(part, asked: LayerInputs, spec: LayerSpec) -> np.ndarray:
    """Slots that queries may see, `[B, K, T, S]`."""
    slot = np.asarray(part.positions)[:, :, None]
    at = np.asarray(asked.positions)[:, None, :, None]
    seen = (slot >= 0) & (slot <= at)
    return seen if spec.window is None else seen & (at - slot < spec.window)


@pytest.mark.sweep(1, 4)
@GIVEN_SPEC
@EVERY
def test_a_query_is_what_it_is_alone(name, spec):
    """Gathered for one query, masked for several: the same numbers."""
    cache, asked = held(name, spec, 0.3)
    many = attended(cache, asked.q, asked.positions)
    for t in range(LATER):
        one = attended(cache, asked.q[:, :, t : t + 1], asked.positions[:, t : t + 1])
        np.testing.assert_allclose(one.out[:, :, 0], many.out[:, :, t], atol=1e-5)
        np.testing.assert_allclose(one.lse[:, :, 0], many.lse[:, :, t], atol=1e-5)


@pytest.mark.sweep(1, 4)
@GIVEN_SPEC
@EVERY
def test_what_is_read_is_held_and_seen(name, spec):
    """And is less than all, within the budget and what is read beside it."""
    cache, asked = held(name, spec, 0.1)
    parts = [part for part in cache.parts if isinstance(part, AbstractSelecting)]
    masks = chosen(cache, asked.q, asked.positions)
    for part, mask in zip(parts, masks, strict=True):
        mask, seen = np.asarray(mask), visible(part, asked, spec)
        assert not (mask & ~seen).any() and mask.any(axis=(1, 2, 3)).all()
        assert (mask.sum(-1) < seen.sum(-1)).any()


@pytest.mark.sweep(1, 4)
@GIVEN_SPEC
@EVERY
def test_reading_all_is_attention_to_all(name, spec):
    cache, asked = held(name, spec, 1.0)
    ours = attended(cache, asked.q, asked.positions)
    whole, _ = held_whole(spec)
    want = attended(whole, asked.q, asked.positions)
    np.testing.assert_allclose(ours.out, want.out, atol=1e-5)
    np.testing.assert_allclose(ours.lse, want.lse, atol=1e-5)
    for part in cache.parts:
        if isinstance(part, AbstractSelecting):
            (mask,) = chosen(cache, asked.q, asked.positions)
            np.testing.assert_array_equal(mask, visible(part, asked, spec))


@functools.lru_cache
def held_whole(spec: LayerSpec) -> tuple[LayerCache, LayerInputs]:
    """The same tokens, read as a whole."""
    whole = draw(5, spec, tuple(LENGTHS + LATER))
    sample, plain = prefix(whole, LENGTHS), dataclasses.replace(spec, window=None)
    given = dataclasses.replace(sample.inputs, spec=plain)
    cache = compressed(dataclasses.replace(sample, inputs=given), Compression())
    return dataclasses.replace(cache, spec=spec), whole.inputs


@pytest.mark.sweep(1, 4)
@EVERY
def test_free_slots_may_hold_anything(name):
    cache, asked = held(name, SPECS["plain"], 0.3)

    def ruined(part):
        free = (part.positions == EMPTY)[..., None]
        sides = {
            side: PlainArray(data=jnp.where(free, jnp.nan, getattr(part, side).data))
            for side in ("keys", "values")
        }
        return dataclasses.replace(part, **sides)

    bad = dataclasses.replace(cache, parts=tuple(map(ruined, cache.parts)))
    for count in (1, LATER):
        given = (asked.q[:, :, :count], asked.positions[:, :count])
        clean, dirty = attended(cache, *given), attended(bad, *given)
        np.testing.assert_array_equal(clean.out, dirty.out)


@pytest.mark.sweep(1, 4)
@EVERY
def test_no_read_finds_more_than_the_oracle(name):
    """Of the attention to what is chosen from, with as many tokens."""
    spec = SPECS["plain"]
    cache, asked = held(name, spec, 0.2)
    oracle, _ = held("exact_topk", spec, 1.0)
    ranked = oracle.parts[0]
    assert isinstance(ranked, AbstractSelecting)
    (mask,) = chosen(cache, asked.q, asked.positions)
    part = next(one for one in cache.parts if isinstance(one, AbstractSelecting))
    assert isinstance(part.keys, PlainArray)
    keys = np.asarray(part.keys.data, np.float64)
    q = np.asarray(asked.q, np.float64)
    for row, kv, t in np.ndindex(len(LENGTHS), spec.num_kv_heads, LATER):
        live = np.asarray(part.positions)[row, kv] >= 0
        heads = range(kv * spec.groups, (kv + 1) * spec.groups)
        logits = np.stack([keys[row, kv] @ q[row, h, t] * spec.scale for h in heads])
        weight = np.where(live, np.exp(logits - logits[:, live].max()), 0.0)
        weight = (weight / weight.sum(axis=-1, keepdims=True)).sum(axis=0)
        mine = np.asarray(mask)[row, kv, t]
        most = np.sort(weight)[::-1][: mine.sum()].sum()
        assert weight[mine].sum() <= most + 1e-9
        if name == "exact_topk":
            np.testing.assert_allclose(weight[mine].sum(), most, rtol=1e-6)


HEADS = {"score": "knorm", "budget": {"type": "ada", "keep": 0.5}}
SPLIT = {
    "score": "knorm",
    "budget": {"type": "uniform", "keep": 0.5},
    "values": {"type": "uniform", "keep": 0.25},
}


@EVERY
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"evict": HEADS}, "head-wise budgets use one flat buffer"),
        ({"evict": SPLIT}, "a separate budget for values excludes"),
        (
            {
                "evict": {"score": "knorm", "budget": {"type": "uniform", "slots": 9}},
                "schedule": "every_tokens",
            },
            "exclude each other",
        ),
    ],
)
def test_what_a_read_excludes(name, fields: dict[str, Any], says):
    with pytest.raises(ValueError, match=says):
        kvjax.compression("none", read=name, **fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"read": "retroinfer", "read.segment": 250}, "multiple of `cluster`"),
        ({"read": "retroinfer", "read.sinks": 300}, "at least `sinks`"),
        ({"read": "retroinfer", "read.estimate": 1.5}, "must be a number in"),
        ({"read": {"type": "infllm", "slots": 9}}, "exactly one of"),
        ({"read": "exact_topk", "read.join": 0}, "read.join"),
        ({"read": "shadowkv", "store.residual": 8}, "leaves later tokens plain"),
        (
            {"read": "retroinfer", "store.keys": {"type": "affine", "axis": "channel"}},
            "decodable by themselves",
        ),
        ({"read": "infllm", "store.keys": "low_rank"}, "encodes the whole prompt"),
    ],
)
def test_bad_input(fields, says):
    with pytest.raises(ValueError, match=says):
        kvjax.compression("none", **fields)


@EVERY
def test_budgets_of_reads(name):
    read = CHOOSING[name]
    assert isinstance(read, AbstractBudgeted)
    assert read.with_keep(0.5).kept == 0.5
    c = kvjax.compression("none", read=name).with_keep(0.125)
    assert c.keep == 0.125 and c.has_budget and c.read.kept == 0.125


@pytest.mark.sweep(0, 1)
@EVERY
def test_what_eviction_leaves_is_read_from(name):
    """Heads hold other tokens then, and the two forms agree."""
    c = kvjax.compression(
        "none",
        evict={"score": "knorm", "budget": {"type": "uniform", "keep": 0.6}},
    )
    c = dataclasses.replace(c, read=CHOOSING[name].with_keep(0.3))
    prompt, later, whole = batch()
    count = np.array([20, 9, 20], np.int32)
    how = (small_model(), prompt, PROMPTS, c)
    _, cache = kvjax.prefill(*how, max_new_tokens=24)
    assert any(not isinstance(part, Slots) for part in cache.layers[0].parts)
    real, _ = kvjax.extend(small_model(), cache, later[:, :20], count)
    width = int((PROMPTS + count).max())
    given = (whole[:, :width], PROMPTS + count, PROMPTS, c)
    ours = kvjax.simulate(small_model(), *given)
    for row, n in enumerate(PROMPTS):
        after = np.asarray(ours)[row, n : n + count[row]]
        np.testing.assert_allclose(after, real[row, : count[row]], atol=1e-4)
