"""A compression that is another in some layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Pages, Slots
from kvjax.codecs import AffineArray, PlainArray
from kvjax.compress.config import LayerRange
from kvjax.compress.plan import LayerPlan, Storage
from kvjax.compress.presets import canonical
from kvjax.config import shortened
from kvjax.types import nbytes
from tests.small import LENGTHS, assert_forms_agree, batch, preset, small_model

PLAIN = {"store": {}}
CODES = {"keys": {"type": "affine", "bits": 8, "group": None, "symmetric": True}}
LAYERS = 4
model = functools.lru_cache(lambda: small_model(layers=LAYERS))


def short(name: str, **fields) -> kvjax.Compression:
    """At test size, its ranges as they are."""
    c = kvjax.compression(name, **fields)
    return dataclasses.replace(shortened(c), layers=c.layers)


def compressed(name: str, **fields) -> kvjax.KVCache:
    prompt, _, _ = batch()
    return kvjax.prefill(model(), prompt, LENGTHS, short(name, **fields))[1]


def kinds(cache: kvjax.KVCache) -> list[tuple[type, type]]:
    """Of every layer the body's class, and that of its keys."""
    return [(type(x.parts[0]), type(x.parts[0].keys)) for x in cache.layers]  # type: ignore


def test_ranges_count_from_both_ends_and_later_ones_win():
    some = LayerRange(first=-3, stop=-1)
    assert [some.holds(n, 5) for n in range(5)] == [False, False, True, True, False]
    codes = shortened(kvjax.compression("int8")).store
    c = kvjax.Compression(
        layers=(
            LayerRange(store=codes),
            LayerRange(first=1, stop=3, store=Storage()),
        )
    )
    found = [c.at(layer, 4).store for layer in range(4)]
    assert found == [codes, Storage(), Storage(), codes]
    assert c.at(0, 4) == LayerPlan(store=codes)


def test_from_yaml_and_by_overrides():
    c = kvjax.compression("int8", layers=[{"stop": 2, **PLAIN}, {"first": -1, **PLAIN}])
    assert c.layers == (
        LayerRange(stop=2, store=Storage()),
        LayerRange(first=-1, store=Storage()),
    )
    moved = kvjax.compression("quest", **{"layers.0.stop": 4})
    assert [type(moved.at(n, 6).read).__name__ for n in (3, 4)] == ["All", "Quest"]
    assert "stop: 4" in canonical(moved)


def test_what_is_held_differs_by_layer():
    stored = compressed("int8", layers=[{"stop": 1, **PLAIN}, {"first": -1, **PLAIN}])
    coded, plain = (Slots, AffineArray), (Slots, PlainArray)
    assert kinds(stored) == [plain, coded, coded, plain]
    read = compressed("quest", layers=[{"first": 1, "stop": 3, "read": "all"}])
    assert [kind for kind, _ in kinds(read)] == [Pages, Slots, Slots, Pages]


def test_an_eviction_of_its_own():
    """Some layers keep everything, the others what their own budget says."""
    whole = {"score": "knorm", "budget": {"type": "uniform", "keep": 1.0}}
    cache = compressed("knorm", layers=[{"stop": 2, "evict": whole}])
    alone = compressed("knorm")
    for row, length in enumerate(LENGTHS):
        for layer in range(LAYERS):
            held = [len(x) for x in cache.kept_positions(layer)[row]]
            other = [len(x) for x in alone.kept_positions(layer)[row]]
            assert held == ([length] * 2 if layer < 2 else other)
            if layer >= 2:
                pairs = zip(
                    cache.kept_positions(layer)[row],
                    alone.kept_positions(layer)[row],
                    strict=True,
                )
                for one, two in pairs:
                    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("int8", [{"stop": 1, **PLAIN}]),
        (
            "adakv_snapkv",
            [
                {
                    "first": 1,
                    "stop": 3,
                    "evict": {
                        "score": {"type": "snapkv", "window": 8},
                        "budget": {"type": "uniform", "keep": 0.5},
                    },
                }
            ],
        ),
        ("kivi_2bit", [{"first": -1, **PLAIN}]),
        ("snapkv", [{"first": 2, "store": CODES}]),
    ],
    ids=["plain first", "heads alike in between", "no blocks at the end", "codes late"],
)
@pytest.mark.sweep(1, 4)
def test_two_forms_agree(name, layers):
    c = short(name, layers=layers)
    assert_forms_agree(model(), c, flips=not c.store.plain)


def test_bytes_are_those_of_every_layer():
    codes = compressed("int8", layers=[{"stop": 3, **PLAIN}])
    parts = [
        sum(x.nbytes for x in jax.tree.leaves(layer.parts)) for layer in codes.layers
    ]
    assert parts[0] == parts[1] == parts[2] > 1.8 * parts[3]


def test_a_range_of_no_layer_is_refused():
    prompt, _, _ = batch()
    c = kvjax.compression("int8", layers=[{"first": 9, **PLAIN}])
    with pytest.raises(ValueError, match="layers.0 is about layers 9 to the last"):
        kvjax.prefill(model(), prompt, LENGTHS, c)


def test_what_excludes_itself_in_a_range_is_refused():
    with pytest.raises(ValueError, match="head-wise budgets use one flat buffer"):
        kvjax.compression("adakv_snapkv", layers=[{"stop": 1, "read": "quest"}])


def test_a_budget_in_bytes_is_of_all_layers():
    """Layers in bytes of their own: together they stay within what is paid for."""
    fields = {"evict.budget.bytes": 60_000, "layers": [{"stop": 2, "store": CODES}]}
    cache = compressed("knorm", **fields)
    body = sum(nbytes(layer.parts) for layer in cache.layers)
    assert 0.9 * 60_000 <= body / len(LENGTHS) <= 60_000
    assert jnp.all(cache.length == LENGTHS)
    assert preset("knorm").layers == ()
