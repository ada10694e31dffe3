"""A plan against what is really allocated, and against what compilers say."""

import dataclasses
import itertools
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.cache import KVCache, Places
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.programs import (
    closing_program,
    decode_program,
    left_by_prefill,
    prefill_program,
)
from kvjax.planning import Plan, compiling
from kvjax.planning.chips import chip_of
from kvjax.planning.fitting import mildest
from kvjax.planning.planner import Planner
from kvjax.planning.search import last_true, widths
from kvjax.planning.sizes import held_of
from kvjax.planning.words import layers_text
from kvjax.reads import ExactTopK
from kvjax.rope import Rope
from kvjax.schedules import EveryChunk
from kvjax.types import nbytes
from tests.small import PRESETS, one_per_structure, preset, small_model

NEW = 24


def buffers(tree) -> int:
    """Bytes of the buffers that arrays lie in, each once, as the device has them."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    shards = [s.data for leaf in leaves for s in leaf.addressable_shards]
    return sum({s.unsafe_buffer_pointer(): s.nbytes for s in shards}.values())


def prefilled(model: Decoder, name: str, batch: int, context: int) -> KVCache:
    tokens = np.ones((batch, context - NEW), np.int32)
    _, cache = kvjax.prefill(model, tokens, None, preset(name), max_new_tokens=NEW)
    return jax.block_until_ready(cache)


def planner_of(model) -> Planner:
    """One that traces what it is asked for, and searches nothing."""
    config, dtype = getattr(model, "config", model), getattr(model, "dtype", "bfloat16")
    return Planner(config, dtype, NEW, {})


@one_per_structure(fast=2)
def test_it_is_what_is_allocated(name):
    model, batch, context = small_model(), 2, 150
    planner = planner_of(model)
    held = planner.held(preset(name), context, batch)
    real = buffers(prefilled(model, name, batch, context))
    if held.upper:
        assert real <= held.total
    else:
        assert held.total == pytest.approx(real, rel=0.02)
    assert planner.weights == pytest.approx(buffers(nnx.state(model)), rel=0.02)
    assert 0 < held.read <= held.total


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("name", ["none", "kivi_4bit", "pyramidkv"])
def test_windows_and_16_bits(name):
    config = family(windows=(16, 16, None))
    model = Decoder(config, dtype="bfloat16", rngs=nnx.Rngs(0))
    held = planner_of(model).held(preset(name), 200, 3)
    real = buffers(prefilled(model, name, 3, 200))
    assert held.total == pytest.approx(real, rel=0.02)
    assert planner_of(config).held(preset(name), 200, 3) == held  # of the config alone
    if name == "none":
        text = "2 of 3 layers hold 16 slots, 1 hold 192"
        assert layers_text(held.layers) == text


def family(**fields) -> DecoderConfig:
    how = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rope": Rope(head_dim=16),
        "max_positions": 4096,
    }
    return DecoderConfig(**how | fields)


@pytest.mark.sweep(3, 8)
@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_are_the_whole(name):
    c = preset(name)
    _, cache = left_by_prefill(small_model(), 2, 100, c, NEW)
    held = held_of(cache, cache)
    assert held.total == cache.nbytes
    assert 0 < held.read <= held.total
    # Pages are chosen by bounds; tokens, by the oracle, of their keys themselves.
    plain = c.store.plain and (not c.read.block or isinstance(c.read, ExactTopK))
    assert (held.scales == 0) == plain or c.evict and c.evict.values is not None
    kinds = sum(kind.count for kind in held.layers)
    assert kinds == len(small_model().config.layers)


@pytest.mark.parametrize("name", ["none", "snapkv_kivi", "adakv_snapkv"])
def test_a_prompt_in_chunks(name):
    """What is left is what is allocated; reading needs less than at once."""
    model, whole = small_model(), preset(name)
    schedule = EveryChunk(size=64)
    c = dataclasses.replace(whole, schedule=schedule)
    planner = planner_of(model)
    tokens = np.ones((2, 150 - NEW), np.int32)
    _, cache = kvjax.prefill(model, tokens, None, c, max_new_tokens=NEW)
    held = planner.held(c, 150, 2)
    assert held.total == pytest.approx(buffers(cache), rel=0.02)
    in_chunks, at_once = (planner.needs(x, 4000, 1, "tpu") for x in (c, whole))
    assert in_chunks.prefill < at_once.prefill / 3
    given = (model, 2, 150 - NEW, c, NEW)
    passed = prefill_program(*given).trace().out_info
    assert 0 <= nbytes(passed) - held.between < 0.02 * held.between + 2000
    # What tokens are chosen from is plain, and there while the cache is made of it.
    plain = name == "snapkv_kivi"
    assert (held.between > held.total) == plain
    assert held.closing >= held.total + plain * held.between
    assert closing_program(*given).trace().lower().compile() is not None


def test_the_host_s_memory_is_no_part_of_the_peak():
    name, model = "quest", small_model()
    there = kvjax.Storage(place=Places(body="host"))
    c = dataclasses.replace(preset(name), store=there)
    held, here = (planner_of(model).held(x, 150, 2) for x in (c, preset(name)))
    tokens = np.ones((2, 150 - NEW), np.int32)
    _, cache = kvjax.prefill(model, tokens, None, c, max_new_tokens=NEW)
    assert held.host == cache.host_nbytes > 0
    assert held.total == here.total - held.host == cache.nbytes - cache.host_nbytes


def test_codes_and_scales_by_hand():
    # KIVI: keys share a scale and a zero over 32 slots of a channel, values over 32
    # channels of a slot; both are 16 bits, codes 4.
    config = family(head_dim=32, rope=Rope(head_dim=32))
    held = planner_of(config).held(kvjax.compression("kivi_4bit"), 1024 + NEW, 1)
    heads, d = config.num_kv_heads * config.num_layers, config.head_dim
    slots = held.codes // (heads * d)  # half a byte each, of keys and of values
    assert 1024 - 128 <= slots <= 1024 + 256
    assert held.scales == heads * (slots // 32 * d + slots * d // 32) * 4
    assert held.total - held.read in range(64)  # lengths and digest are not read


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize("name", ["none", "snapkv"])
def test_programs_are_those_that_run(name):
    """Arguments and results of the compiled programs are what the plan holds."""
    model, c = small_model(), preset(name)
    planner = planner_of(model)
    held = planner.held(c, 150, 1).total
    reading = prefill_program(model, 1, 150 - NEW, c, NEW)
    left = left_by_prefill(model, 1, 150 - NEW, c, NEW)
    traced = reading.trace()
    full = jax.tree.map(lambda x: (x.shape, x.dtype), traced.out_info)
    made = (left[0], dataclasses.replace(left[1], digest=None))
    assert full == jax.tree.map(lambda x: (x.shape, x.dtype), made)
    memory = traced.lower().compile().memory_analysis()
    logits = 4 * model.config.vocab_size
    assert memory.output_size_in_bytes - logits == pytest.approx(held, rel=0.02)
    step = decode_program(model, *left, NEW).trace().lower().compile()
    arguments = step.memory_analysis().argument_size_in_bytes
    assert arguments == pytest.approx(planner.weights + held, rel=0.02)


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "kivi_4bit", "snapkv", "kvzip"])
def test_temporaries_are_near_what_a_compiler_says(name):
    config = family(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1536,
        num_heads=8,
        head_dim=64,
        rope=Rope(head_dim=64),
    )
    how = {"context": 2048, "batch": 4, "dtype": "float32"}
    c = {name: kvjax.compression(name)}
    (formula,), (real,) = (
        kvjax.plan(config, c, compile=asked, **how).rows for asked in (False, True)
    )
    assert real.marks["peak"] == "compiled" and formula.marks["peak"] == "formula"
    assert formula.peak == pytest.approx(real.peak, rel=0.25)


@pytest.mark.sweep(1, 4)
@pytest.mark.parametrize("name", PRESETS)
def test_more_tokens_never_need_less(name):
    contexts, c = (128, 300, 512, 1024), preset(name)
    found = [left_by_prefill(small_model(), 1, n - NEW, c, NEW)[1] for n in contexts]
    sizes = [cache.nbytes for cache in found]
    assert sizes == sorted(sizes)


def test_the_largest_that_fits_does_and_the_next_does_not():
    config = family()
    alone = kvjax.plan(config, "none", context=1024).rows[0].peak
    most = alone + alone // 10
    found = kvjax.plan(config, "none", context=1024, memory=most)
    planner, (row,) = found.planner, found.rows
    assert planner is not None and row.fits and row.context_bound == "memory"
    contexts, kind = widths(config.max_positions, 64), found.chips[0].kind
    place, rows = contexts.index(row.largest_context), row.largest_batch

    def peak(context: int, batch: int) -> int:
        return planner.needs(kvjax.compression("none"), context, batch, kind).peak

    assert peak(contexts[place], 1) <= most < peak(contexts[place + 1], 1)
    assert peak(1024, rows) <= most < peak(1024, rows + 1)


@pytest.mark.parametrize("name", ["snapkv", "int8"])
def test_the_mildest_fits_and_the_next_milder_does_not(name):
    planner, c = planner_of(family()), preset(name)
    weaker = c.with_keep(0.5) if c.has_budget else c.with_bits(4)
    memory = planner.needs(weaker, 1024, 1, "cpu").peak + 1
    chip = dataclasses.replace(chip_of("v5e", memory), kind="cpu")
    ((label, found),) = mildest(planner, {name: c}, 1024, 1, chip).items()
    assert planner.needs(found, 1024, 1, "cpu").peak <= memory
    if c.has_budget:
        assert found.keep is not None and 0.5 <= found.keep < 0.55 and label == name
        milder = found.with_keep(round(found.keep + 0.01, 2))
    else:
        assert label == "int8, 4 bits"
        milder = found.with_bits(8)
    assert planner.needs(milder, 1024, 1, "cpu").peak > memory


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_the_last_place_that_holds(count):
    for edge, guess in itertools.product(range(count + 1), (-3, 0, count // 2, 200)):
        looks = []

        def holds(n, edge=edge, looks=looks):
            looks.append(n)
            return n < edge

        assert last_true(holds, count, guess) == edge - 1
        assert len(looks) == len(set(looks)) <= 2 * count.bit_length() + 2


def test_widths_are_those_of_programs():
    found = widths(4096, 64)
    assert found[-1] == 4096 and list(found) == sorted(set(found))
    planner, none = planner_of(family()), kvjax.compression("none")
    wide, after = widths(4096, NEW)[5:7]
    sizes = [planner.held(none, n, 1).total for n in (wide, wide + 1, after)]
    assert sizes[0] < sizes[1] == sizes[2]


def test_as_json_and_back():
    found = kvjax.plan(family(), "none", context=1024, device=["v5e", "h200"])
    tree = json.loads(json.dumps(found.as_tree(), allow_nan=False))
    again = Plan.of_tree(tree)
    assert again == found and again.table() == found.table()
    assert again.headline == found.headline == tree["headline"]
    with pytest.raises(ValueError, match="read from JSON"):
        again.plot()
    for broken in ({}, {**tree, "rows": [{}]}, {**tree, "more": 1}):
        with pytest.raises(ValueError, match="tree of a plan"):
            Plan.of_tree(broken)
    assert set(tree["rows"][0]["marks"]) <= set(tree["rows"][0])
    numbers = {k for k, v in tree["rows"][0].items() if type(v) in (int, float)}
    assert numbers - set(tree["rows"][0]["marks"]) <= {
        "memory",
        "cache",
        "free",
        "keep",
    }


def test_several_chips_hold_their_share():
    config = family(num_kv_heads=4, vocab_size=96)
    one = kvjax.plan(config, "none", context=1024, batch=4).rows[0]
    many = kvjax.plan(config, "none", context=1024, batch=4, chips=8).rows[0]
    # 4 ways by heads, 2 by rows; norms are everywhere.
    assert many.codes * 8 == one.codes
    assert one.weights / 4 < many.weights < one.weights / 3
    assert many.prefill_flops * 8 <= one.prefill_flops
    # Heads that share slots are whole on each of the chips that split heads.
    how: dict[str, Any] = {"context": 1024, "batch": 4}
    one = kvjax.plan(config, "adakv_snapkv", **how).rows[0]
    many = kvjax.plan(config, "adakv_snapkv", chips=8, **how).rows[0]
    assert many.codes * 2 == one.codes and many.marks["codes"] == "shapes"
    with pytest.raises(ValueError, match="a batch of 3 over 2 chips"):
        kvjax.plan(config, "none", context=1024, batch=3, chips=8)
    with pytest.raises(ValueError, match="num_heads of 4 over 3 chips"):
        kvjax.plan(config, "none", context=1024, mesh={"model": 3})


def test_floors_by_hand():
    config = family()
    row = kvjax.plan(config, "none", context=512, device="v5e").rows[0]
    layer = 48 * (64 + 32 + 32) + 64 * 48 + 3 * 48 * 80
    tokens, pairs = 448, 448 * 449 // 2
    flops = 2 * (tokens * 3 * layer + 48 * 97) + 3 * 4 * pairs * 4 * 16
    assert row.prefill_flops == flops
    assert row.prefill_s == pytest.approx(flops / 197e12)
    assert row.ms_per_token == pytest.approx(1e3 * row.read / 820e9)


def test_the_figure_has_what_it_says():
    found = kvjax.plan(family(), ["none", "int8"], device="v5e", memory=4_000_000)
    (axes,) = found.plot().axes
    said = {text.get_text().strip() for text in axes.texts}
    assert {"none", "int8", "weights", "v5e: 4.0 MB"} <= said
    labels = [line.get_label() for line in axes.lines[:2]]
    assert labels == ["none", "int8"]
    for line, row in zip(axes.lines, found.rows, strict=False):
        assert np.asarray(line.get_ydata())[-1] == pytest.approx(row.peak / 1e9)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"context": 5000}, "5,000 tokens; the model's range is 4,096"),
        ({"context": 64}, "leaves no prompt"),
        ({"context": 0}, "context"),
        ({"device": "v5"}, "Did you mean 'v5"),
        ({"device": []}, "names no chip"),
        ({"device": 3}, "chip's name or several; got 3"),
        ({"device": "v5e", "memory": 16 << 30}, "v5e can have 16,911,433,728 bytes"),
        ({"memory": 0}, "at least 1"),
        ({"c": []}, "names no compression"),
        ({"c": "nothing"}, "Unknown compression"),
        ({"c": 3}, "must be a compression"),
        ({"c": "matryoshka"}, "matryoshka: store.keys"),
        ({"mesh": {"tensor": 2}}, "axes `data`"),
        ({"mesh": {"model": 2}, "chips": 8}, "has 2 chips"),
        ({"mesh": {"data": 1}, "compile": True}, "about one chip"),
        ({"device": "v5e", "compile": True}, "KVJAX_TPU_PYTHON names another"),
        ({"dtype": "int8"}, "dtype"),
        ({"batch": 0}, "batch"),
        ({"model": "nobody/nothing"}, "is not known here"),
        ({"model": 3}, "model"),
    ],
)
def test_wrong_input_is_named(how, said, monkeypatch):
    monkeypatch.setenv("KVJAX_TPU_PYTHON", "/nowhere/python")
    given = {"model": family(), "c": "none", **how}
    with pytest.raises(ValueError) as wrong:
        kvjax.plan(given.pop("model"), given.pop("c"), **given)
    assert said in str(wrong.value)


@pytest.mark.parametrize("status", ["failed", "too large"])
def test_what_no_compiler_accepts_does_not_fit(status, monkeypatch):
    """Whatever the formula says, and however much larger what is asked for could be."""
    refused = {"status": status, "reason": "it would not", "total": None}
    monkeypatch.setattr(compiling, "_compiled", lambda *_: refused)
    how: dict[str, Any] = {"context": 1024, "memory": 10**9}
    (row,) = kvjax.plan(family(), "none", compile=True, **how).rows
    assert not row.fits and row.largest_context < 1024 and row.largest_batch == 0
    assert any("it would not" in note for note in row.notes)


def test_a_budget_of_what_is_read_is_not_searched_for():
    config = family()
    found = kvjax.plan(config, "quest", context=1024, fit=True).rows[0]
    assert found.keep == kvjax.compression("quest").keep
    assert any("what a step reads" in note for note in found.notes)
