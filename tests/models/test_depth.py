"""A loop over layers computes what the layers one by one do, under every preset."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax.attention import causal_attention
from kvjax.compress.survey import survey
from kvjax.depth import (
    PERIOD,
    Depth,
    grouped,
    in_order,
    members,
    over,
    plan,
    regrouped,
)
from kvjax.models import Decoder, generation, inference, simulate
from kvjax.models.config import DecoderConfig
from kvjax.models.sampling import Sampling
from kvjax.models.simulate import simulated
from kvjax.types import loops_of, padded_positions
from tests.models.by_layer import ByLayer
from tests.models.samples import CONFIGS
from tests.small import LATER, LENGTHS, PRESETS, WIDTH, batch, preset, small_model

LAYERS = 3
EVERY = pytest.mark.parametrize("name", PRESETS)


def shares_by_data(name: str) -> bool:
    """Whether what a layer holds depends on what is found in others."""
    c = preset(name)
    return any(part.evict and part.evict.budget.surveys for part in c.parts)


BY_THEMSELVES = [name for name in PRESETS if not shares_by_data(name)]
"""Of the others' layers, tests/compress/test_surveys.py."""


KINDS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.tuples(
        st.lists(st.integers(0, 3), max_size=2),
        st.lists(st.integers(0, 3), min_size=1, max_size=PERIOD + 1),
        st.integers(1, 4),
        st.lists(st.integers(0, 3), max_size=2),
    ).map(lambda x: x[0] + x[1] * x[2] + x[3]),
)
"""Layers of any kinds, and such in which a pattern comes again and again."""


@settings(deadline=None)
@given(KINDS)
def test_every_layer_is_in_one_group_of_its_kind(kinds):
    loops = plan(kinds)
    groups = members(loops)
    assert [loop.first for loop in loops[1:]] == [loop.stop for loop in loops[:-1]]
    assert sorted(n for group in groups for n in group) == list(range(len(kinds)))
    for group in groups:
        assert len({kinds[layer] for layer in group}) == 1
    for loop in loops:
        assert loop.turns > 1 or loop.period == 1
        saved = loop.period * (loop.turns - 1)
        for period in range(1, PERIOD + 1):  # no pattern from here on saves more
            turns = 0
            while kinds[loop.first + turns * period :][:period] == kinds[loop.first :][
                :period
            ] and loop.first + (turns + 1) * period <= len(kinds):
                turns += 1
            assert period * (turns - 1) <= saved


@settings(deadline=None, max_examples=10)
@given(KINDS, st.data())
def test_arrays_of_groups_stay_those_of_their_layers(kinds, data):
    layers = np.arange(len(kinds))
    tree = {"one": jnp.asarray(layers), "two": jnp.asarray(layers[:, None] * 10.0)}
    loops = plan(kinds)
    groups = grouped(loops, tree)
    for group, held in zip(members(loops), groups, strict=True):
        np.testing.assert_array_equal(held["one"], list(group))
    back = in_order(loops, groups)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    other = plan([kinds[n] // data.draw(st.integers(1, 4)) for n in layers])
    moved = regrouped(loops, groups, other)
    jax.tree.map(np.testing.assert_array_equal, moved, grouped(other, tree))


def one_layer(kind: int, layer: Any, state, given, gain):
    """Another function for each kind, and what it leaves is of another shape."""
    x = jnp.sin(state * (1.0 + kind) + gain * given + 0.1 * jnp.asarray(layer, "f4"))
    return x + 0.5 * state, jnp.cos(x)[: kind + 1]


@settings(deadline=None, max_examples=6)
@given(KINDS.map(lambda x: x[:10]), st.booleans(), st.booleans(), st.booleans())
def test_loops_are_the_layers_one_by_one(kinds, remat, unroll, apart):
    loops, count = plan(kinds), len(kinds)
    rng = np.random.default_rng(0)
    start, gain = (jnp.asarray(rng.normal(size=4), jnp.float32) for _ in range(2))
    xs = jnp.asarray(rng.normal(size=(count, 4)), jnp.float32)
    mix = [jnp.asarray(rng.normal(size=kind + 1), jnp.float32) for kind in kinds]
    groups = members(loops)

    def looped(start, xs, gain):
        def step(depth: Depth, state, given):
            kind = kinds[groups[depth.group].start]
            return one_layer(kind, depth.layer, state, given, gain)

        how = {"remat": remat, "unroll": unroll, "apart": apart}
        last, outs = over(loops, step, start, grouped(loops, xs), **how)
        place = {}
        for group, left in zip(groups, outs, strict=True):
            place |= dict(zip(group, left, strict=True))
        return last, [place[n] for n in range(count)]

    def plain(start, xs, gain):
        state, outs = start, []
        for n, kind in enumerate(kinds):
            state, out = one_layer(kind, n, state, xs[n], gain)
            outs.append(out)
        return state, outs

    def total(run):
        def loss(*args):
            state, outs = run(*args)
            left = sum(jnp.sum(x * y) for x, y in zip(mix, outs, strict=True))
            return jnp.sum(state**2) + left, (state, outs)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)

    args = (start, xs, gain)
    ours, wanted = jax.jit(total(looped))(*args), jax.jit(total(plain))(*args)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        ours,
        wanted,
    )


def test_a_layer_knows_its_place():
    kinds = [9, 0, 1, 0, 1, 0, 1]

    def step(depth: Depth, state, given):
        seen = jnp.stack([jnp.asarray(x) for x in (depth.layer, depth.turn, given)])
        return state, (seen, jnp.int32(depth.group))

    loops = plan(kinds)
    assert [list(group) for group in members(loops)] == [[0], [1, 3, 5], [2, 4, 6]]
    _, outs = over(loops, step, (), grouped(loops, jnp.arange(7, dtype=jnp.int32)))
    seen, groups = in_order(loops, outs)
    np.testing.assert_array_equal(seen[:, 0], np.arange(7))
    np.testing.assert_array_equal(seen[:, 1], [0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(seen[:, 2], np.arange(7))
    np.testing.assert_array_equal(groups, [0, 1, 2, 1, 2, 1, 2])


def total_of(name: str, *, unroll: bool, remat: bool = False, layers: int = LAYERS):
    """A number that depends on every state behind the layers, and the weights."""
    graph, params = nnx.split(small_model(layers=layers))
    total = jnp.asarray(LENGTHS + LATER)
    width = int(total.max())
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 60, (len(LENGTHS), width)), jnp.int32)
    positions = padded_positions(total, width)
    points = jnp.asarray(LENGTHS, jnp.int32)
    mix = jnp.asarray(rng.normal(size=64), jnp.float32)

    def loss(params):
        model: Decoder = nnx.merge(graph, params)
        attention = simulated(model, points, tokens, preset(name))
        how = {"trained": True, "unroll": unroll, "remat": remat}
        hidden = model(tokens, positions, attention, **how)
        return jnp.sum(jnp.where((positions >= 0)[..., None], hidden, 0) @ mix) ** 2

    return loss, params


DEEPER = ("chunkkv", "duo", "pyramidkv", "quest", "random", "snapkv_kivi")


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize(
    ("name", "layers"), [*((x, LAYERS) for x in PRESETS), *((x, 7) for x in DEEPER)]
)
def test_every_preset(name, layers):
    plain, params = total_of(name, unroll=True, layers=layers)
    looped, _ = total_of(name, unroll=False, layers=layers)
    np.testing.assert_allclose(
        jax.jit(looped)(params), jax.jit(plain)(params), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["none", "snapkv_kivi"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.sweep(0, 2)
def test_gradient(name, remat):
    plain, params = total_of(name, unroll=True)
    looped, _ = total_of(name, unroll=False, remat=remat)
    slopes = [jax.tree.leaves(jax.jit(jax.grad(f))(params)) for f in (plain, looped)]
    scale = max(float(jnp.abs(leaf).max()) for leaf in slopes[0])
    for one, other in zip(*slopes, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4 * scale)


def alike(config: DecoderConfig, c: kvjax.Compression, tokens: int):
    """First layer, period and turns of the loops, and which layers share buffers."""
    lengths = jnp.asarray([tokens], jnp.int32)
    found = survey(c, config.layers, lengths, tokens, jnp.dtype("float32"))
    loops = loops_of(config.layers, found.layouts)
    pooled = [layout.pooled for layout in found.layouts]
    return [(loop.first, loop.period, loop.turns) for loop in loops], pooled


@pytest.mark.parametrize(
    ("name", "expected", "pooled"),
    [
        ("none", [(0, 1, 6)], False),
        ("snapkv", [(0, 1, 6)], False),
        ("random", [(0, 1, 6)], False),  # a seed per layer is data
        ("pyramidkv", [(0, 1, 6)], True),  # slots per layer
        ("adakv_snapkv", [(0, 1, 6)], True),  # slots per head
        ("duo", [(0, 1, 6)], True),
        ("quest", [(0, 1, 1), (1, 1, 5)], False),  # a dense layer first
        ("chunkkv", [(0, 1, 6)], False),  # whether a choice is reused is data
    ],
)
def test_which_layers_are_alike(name, expected, pooled):
    model, c = small_model(layers=6), preset(name)
    loops, together = alike(model.config, c, WIDTH)
    assert loops == expected and together == [pooled] * 6
    prompt, _, _ = batch()
    cache = jax.eval_shape(lambda x: kvjax.prefill(model, x, None, c)[1], prompt)
    assert [(x.first, x.period, x.turns) for x in cache.loops] == expected


def test_equal_budgets_of_a_pyramid_share_no_buffer():
    c = preset("pyramidkv").with_keep(1.0)
    assert alike(small_model(layers=6).config, c, WIDTH) == ([(0, 1, 6)], [False] * 6)


@pytest.mark.parametrize("name", ["none", "snapkv"])
def test_windows_that_come_in_a_pattern(name):
    """Five local layers and one that sees all, as Gemma 3 has them."""
    windows = tuple(None if n % 6 == 5 else 8 for n in range(14))
    config = dataclasses.replace(
        CONFIGS["gemma3_text"], num_layers=14, windows=windows, max_positions=1024
    )
    loops, _ = alike(config, preset(name), WIDTH)
    assert loops == [(0, 6, 2), (12, 1, 2)]


def test_attention_is_called_once_per_kind():
    model, calls = small_model(layers=LAYERS), []
    tokens = jnp.ones((1, 8), jnp.int32)

    def attention(inputs):
        calls.append(inputs.depth.layer)
        return causal_attention(inputs)

    for unroll, count in ((False, 1), (True, LAYERS)):
        jax.eval_shape(
            lambda x, u=unroll: model(tokens, x, attention, unroll=u),
            jnp.arange(8)[None],
        )
        assert len(calls) == count
        calls.clear()


def test_what_attention_closes_over_has_its_gradient():
    graph, params = nnx.split(small_model(layers=LAYERS))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 24)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)

    def loss(gain, unroll):
        model: Decoder = nnx.merge(graph, params)

        def attention(inputs):
            return gain * causal_attention(inputs)

        seen = model.run(tokens, positions, attention, trained=True, unroll=unroll)
        assert [loop.turns for loop in seen.loops] == [LAYERS]
        return jnp.sum(seen.hidden[..., 0])

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    slope, again = (grad(0.7, unroll) for unroll in (True, False))
    assert abs(float(slope)) > 1e-2
    np.testing.assert_allclose(again, slope, rtol=1e-4)


@pytest.mark.sweep(1, 3)
@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_a_deep_model_is_its_layers(name):
    """Prompt, cache and generation, against every layer with a cache of its own."""
    model, c, steps = small_model(layers=6), preset(name), 10
    prompt, _, _ = batch()
    alone = ByLayer(model, c, room=steps)
    first, caches = alone.prompt(prompt, LENGTHS)
    logits, cache = kvjax.prefill(model, prompt, LENGTHS, c, max_new_tokens=steps)
    np.testing.assert_allclose(logits, first, atol=1e-4)
    for layer, held in enumerate(caches):
        parts = [part.live_positions() for part in (*held.parts, held.tail)]
        for row, heads in enumerate(cache.kept_positions(layer)):
            for head, kept in enumerate(heads):
                own = np.sort(np.concatenate([part[row][head] for part in parts]))
                np.testing.assert_array_equal(kept, own)
    tokens, seen = alone.greedy(first, caches, LENGTHS, steps)
    made = kvjax.generate(model, prompt, LENGTHS, c, max_new_tokens=steps)
    np.testing.assert_array_equal(made.tokens, tokens)
    again, _ = kvjax.extend(model, cache, tokens[:, :-1])
    np.testing.assert_allclose(again, seen, atol=1e-4)


def equations(program: Any) -> int:
    """Of a program and all programs in it."""
    program = getattr(program, "jaxpr", program)
    inner = [
        held
        for equation in program.eqns
        for held in jax.tree.leaves(list(equation.params.values()))
        if hasattr(held, "jaxpr") or hasattr(held, "eqns")
    ]
    return len(program.eqns) + sum(map(equations, inner))


def sizes(name: str, layers: int) -> dict[str, int]:
    """Equations of what a prompt, a step, many tokens and training run."""
    c, model = preset(name), small_model(layers=layers)
    graph, params = nnx.split(model)
    tokens, lengths = jnp.ones((1, 64), jnp.int32), jnp.asarray([64], jnp.int32)
    found: dict[str, Any] = {}
    how = (c, 8, None)
    found["prefill"] = inference._prefill.trace(graph, params, tokens, lengths, *how)
    logits, cache = found["prefill"].out_info
    for width in (1, 6):
        new = jnp.zeros((1, width), jnp.int32)
        found[f"extend {width}"] = inference._extend.trace(
            graph, params, *cache.apart, new, new
        )
    stops, greedy = jnp.full((4,), -1, jnp.int32), Sampling(temperature=0.0)
    args = (jax.random.key(0), stops, 0, greedy, 8)
    state = jax.eval_shape(
        lambda x, n: generation._first(x, n, *args), logits, cache.length
    )
    found["decode"] = generation._decode.trace(
        graph, params, *cache.apart, state, jnp.int32(8), stops, sampling=greedy
    )
    found["simulate"] = simulate._simulate.trace(
        graph, params, tokens, lengths, lengths - 8, c
    )
    return {what: equations(traced.jaxpr) for what, traced in found.items()}


@pytest.mark.sweep(4, 12)
@EVERY
def test_programs_do_not_grow_with_depth(name):
    assert sizes(name, 8) == sizes(name, 16)
