"""Rows that are read in chunks: the same loss and gradient, and what stays held."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.compress.rolling_check import check_rolling
from kvjax.models import Decoder
from kvjax.models.chunked import Chunking, plainly
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives.chunked import segmented
from kvjax.train.objectives.losses import next_token, token_scores
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import (
    CachedConfig,
    ChunksConfig,
    CompressionChoice,
    DuoConfig,
    LoRAConfig,
    ObjectiveConfig,
    SamplingConfig,
    TrainConfig,
    as_tree,
)
from kvjax.train.recipe.files import decode_recipe
from kvjax.train.run import run
from kvjax.train.run.abstract import abstract_batch
from kvjax.train.run.flops import matmul_flops
from kvjax.train.run.lora import with_lora
from kvjax.train.run.mesh import make_mesh
from kvjax.train.run.model import check_shape, weights_of
from kvjax.train.run.params import params_of, split, with_params
from kvjax.types import EMPTY, padded_positions
from tests.models.samples import CONFIGS, sample
from tests.train.small import SHAPE, model_of, recipe

ROWS, WIDTH, ENDS = 2, 48, np.array([48, 37], np.int32)


@functools.cache
def rows_of(vocab: int) -> TokenBatch:
    """Rows of two lengths; what is behind their ends does not count."""
    draw = np.random.default_rng(0)
    live = np.arange(WIDTH) < ENDS[:, None]
    tokens = np.where(live, draw.integers(4, vocab, (ROWS, WIDTH)), 0)
    return TokenBatch(
        tokens=jnp.asarray(tokens, jnp.int32),
        weights=jnp.asarray(
            np.where(live, draw.uniform(0.1, 1.0, live.shape), 0), "f4"
        ),
        answers=jnp.asarray(live & (draw.random(live.shape) < 0.3)),
        prompt_lengths=jnp.asarray(ENDS // 2),
        step=jnp.int32(0),
        later=WIDTH,
    )


def in_chunks(size: int, **fields: Any) -> TrainConfig:
    """Equal layers are compiled once, which halves these tests."""
    chunks = ChunksConfig(size=size, segments=fields.pop("segments", True))
    return recipe(chunks=chunks, **{"loop_layers": True, **fields})


def gradient(config: TrainConfig, model: Decoder, c=None, teacher=None, only=("*",)):
    """Loss, metrics, and the gradient of the weights that match `only`."""
    objective = make_objective(config, c)
    params, fixed = split(params_of(model), only)

    def run(params, fixed, batch):
        return objective(with_params(model, {**fixed, **params}), batch, teacher)

    run = jax.jit(jax.value_and_grad(run, has_aux=True))
    (loss, metrics), slope = run(params, fixed, rows_of(model.config.vocab_size))
    return loss, metrics, slope


def assert_same(found, wanted, rtol: float = 1e-4) -> None:
    """Losses, metrics, and every weight's gradient by its largest entry."""
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-6)
    assert found[2].keys() == wanted[2].keys()
    for name, slope in wanted[2].items():
        most = float(jnp.abs(slope).max())
        np.testing.assert_allclose(
            found[2][name], slope, rtol=0, atol=rtol * most, err_msg=name
        )


@functools.cache
def at_once():
    return gradient(recipe(loop_layers=True), model_of())


@pytest.mark.sweep(0, 2)
@pytest.mark.parametrize(
    ("size", "segments"), [(7, True), (16, False), (48, True), (500, True)]
)
def test_with_a_full_cache_chunks_change_nothing(size, segments):
    found = gradient(in_chunks(size, segments=segments), model_of())
    assert_same(found, at_once())


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize("family", CONFIGS)
def test_families_in_chunks(family):
    """Windows of 8 tokens are narrower than a chunk of 10 and its past."""
    model = sample(family)
    how = {"loop_layers": True, "remat": True}
    found = gradient(in_chunks(10, **how), model)
    assert_same(found, gradient(recipe(**how), model))


LORA = ("*.lora_a", "*.lora_b")


def test_low_rank_updates_and_a_teacher_in_chunks():
    rank = LoRAConfig(rank=2, modules=("q", "k", "v", "o", "down"))
    model, teacher = (
        with_lora(model_of(), rank, seed=0),
        Decoder(SHAPE, rngs=nnx.Rngs(1)),
    )
    fields = {"objective": ObjectiveConfig(next_token=0.5, distill=0.5)}
    given = (model, None, teacher, LORA)
    found = gradient(in_chunks(20, **fields), *given)
    assert set(found[1]) > {"distill"} and float(found[1]["distill"]) > 0.1
    assert_same(found, gradient(recipe(loop_layers=True, **fields), *given))


def test_nothing_is_computed_for_frozen_weights():
    """The products of a step with LoRA are far fewer than those of all weights."""
    rank = LoRAConfig(rank=1, modules=("q",))
    model, batch = with_lora(model_of(), rank, seed=0), rows_of(100)
    objective = make_objective(in_chunks(16))

    def flops(only) -> int:
        params, fixed = split(params_of(model), only)

        def loss(params):
            return objective(with_params(model, {**fixed, **params}), batch, None)[0]

        return matmul_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    forward = matmul_flops(
        jax.make_jaxpr(lambda: objective(model, batch, None)[0])().jaxpr
    )
    assert flops(("*",)) - flops(LORA) > 0.4 * forward


BOUNDED = {
    "snapkv": {"evict.score.window": 4, "evict.score.kernel": 3},
    "h2o": {},
    "knorm": {},
    "triattention": {},
    "streaming_llm": {},
    "pyramidkv": {"evict.score.window": 4, "evict.budget.beta": 2},
}


def bounded(name: str, slots: int = 12, **more: Any):
    fields = BOUNDED.get(name, {}) | more
    return kvjax.compression(name, **{"evict.budget.slots": slots, **fields})


def chunk_by_chunk(model: Decoder, c, batch: TokenBatch, size: int):
    """Loss of `Chunking.read` in a plain loop, which JAX differentiates by itself."""
    chunking = Chunking.of(c, model.config.layers, WIDTH, model.dtype)
    held, hidden = chunking.start(model.config, jnp.full((ROWS,), WIDTH)), []
    for start in range(0, WIDTH, size):
        tokens = batch.tokens[:, start : start + size]
        positions = jnp.broadcast_to(start + jnp.arange(size), tokens.shape)
        found, held, _ = chunking.read(model, held, tokens, positions, trained=True)
        hidden.append(found)
    scores = token_scores(model, jnp.concatenate(hidden, axis=1), batch)
    return next_token(scores, batch)


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize("name", BOUNDED)
def test_the_gradient_goes_through_what_is_held(name):
    """Through all the chunks for which a token is held, as JAX would have it."""
    model, c, batch = model_of(), bounded(name), rows_of(SHAPE.vocab_size)
    found = gradient(in_chunks(16), model, c)
    graph = jax.jit(
        jax.value_and_grad(
            lambda p: chunk_by_chunk(with_params(model, p), c, batch, 16), has_aux=True
        )
    )
    (loss, metrics), slope = graph(params_of(model))
    assert_same(found, (loss, metrics, slope), rtol=1e-5)
    full = jax.jit(lambda batch: make_objective(recipe())(model, batch, None)[0])
    assert abs(float(loss) - float(full(batch))) > 1e-3  # and it is another loss


def best_of(scores: np.ndarray, positions: np.ndarray, slots: int) -> np.ndarray:
    """The plain rule: the best `slots` of what is there, in order."""
    order = np.lexsort((positions, -scores))[:slots]
    return np.sort(positions[order])


def keydiff(keys: np.ndarray) -> np.ndarray:
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = unit.mean(0)
    return -unit @ (anchor / np.linalg.norm(anchor))


RULES = {
    "knorm": lambda keys, at: -np.linalg.norm(keys, axis=-1),
    "keydiff": lambda keys, at: keydiff(keys),
    "streaming_llm": lambda keys, at: np.where(at < 4, np.inf, at),
}


@pytest.mark.sweep(1, 2)
@pytest.mark.parametrize("name", RULES)
def test_what_stays_is_the_best_of_what_was_held_and_the_chunk(name):
    """In the first layer, whose keys do not depend on what was dropped.

    No token comes twice: its keys would be of one length but for rounding.
    """
    model, slots, size = model_of(), 10, 8
    c, draw = bounded(name, slots), np.random.default_rng(0)
    each = np.tile(np.arange(SHAPE.vocab_size, dtype="i4"), (ROWS, 1))
    tokens = jnp.asarray(draw.permuted(each, axis=1)[:, :WIDTH])
    whole = Chunking.of(kvjax.compression("none"), model.config.layers, WIDTH, "f4")
    chunking = Chunking.of(c, model.config.layers, WIDTH, jnp.float32)
    everywhere = jnp.broadcast_to(jnp.arange(WIDTH), (ROWS, WIDTH))

    @jax.jit
    def keys_of(tokens):
        start = whole.start(model.config, jnp.full((ROWS,), WIDTH))
        held = whole.read(model, start, tokens, everywhere)[1]
        return plainly(held.groups[0]).keys[0]

    @jax.jit
    def read(held, tokens, positions):
        return chunking.read(model, held, tokens, positions)[1]

    keys = np.asarray(keys_of(tokens), np.float64)
    held = chunking.start(model.config, jnp.full((ROWS,), WIDTH))
    kept = [[np.arange(0)] * SHAPE.num_kv_heads for _ in range(ROWS)]
    for start in range(0, WIDTH, size):
        part = slice(start, start + size)
        held = read(held, tokens[:, part], everywhere[:, part])
        found = np.asarray(held.groups[0].tokens.positions[0])
        for row in range(ROWS):
            for head in range(SHAPE.num_kv_heads):
                at = np.concatenate([kept[row][head], np.arange(start, start + size)])
                scores = RULES[name](keys[row, head, at], at)
                kept[row][head] = best_of(scores, at, slots)
                mine = found[row, head]
                np.testing.assert_array_equal(mine[mine >= 0], kept[row][head])


def test_ragged_rows_are_read_as_each_alone():
    """Padding takes no slot, and a row that has ended keeps what it had."""
    model, batch = model_of(), rows_of(SHAPE.vocab_size)
    c, size = bounded("knorm", 9), 8
    chunking = Chunking.of(c, model.config.layers, WIDTH, jnp.float32)

    @jax.jit
    def read(held, tokens, positions):
        return chunking.read(model, held, tokens, positions)[1]

    def held_of(tokens, lengths):
        held = chunking.start(model.config, lengths)
        positions = padded_positions(lengths, WIDTH)
        for start in range(0, WIDTH, size):
            part = slice(start, start + size)
            held = read(held, tokens[:, part], positions[:, part])
        return held

    both = held_of(batch.tokens, jnp.asarray(ENDS))
    np.testing.assert_array_equal(both.seen, ENDS)
    end = int(ENDS[1])
    garbage = batch.tokens.at[1, end:].set(7)  # nothing of it is read
    again = held_of(garbage, jnp.asarray(ENDS))
    for one, other in zip(jax.tree.leaves(both), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    positions = np.asarray(both.groups[0].tokens.positions)
    assert (positions != EMPTY).sum(-1).min() == 9 and positions[:, 1].max() < end


def test_memory_hardly_grows_with_the_row():
    """Four times the tokens: less than 1.5 of the temporaries, against 4 at once."""
    model, c = model_of(), bounded("knorm", 32)

    def temporaries(config: TrainConfig, length: int) -> int:
        objective = make_objective(config, c)
        batch = abstract_batch(1, length, make_mesh(config.mesh))

        def loss(params, batch):
            return objective(with_params(model, params), batch, None)[0]

        lowered = jax.jit(jax.grad(loss)).lower(params_of(model), batch)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    small, large = (temporaries(in_chunks(64), n) for n in (1024, 4096))
    assert large < 1.5 * small


@pytest.mark.parametrize("chunks", [1, 2, 7, 8, 10, 13, 64, 100])
def test_segments_hold_all_chunks(chunks):
    count, size = segmented(chunks, True)
    assert chunks <= count * size <= chunks * 1.2 + 1
    assert count + size <= 2 * chunks**0.5 + 3
    assert segmented(chunks, False) == (chunks, 1)


UNIFORM = {"type": "uniform", "slots": 64}


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("snapkv", {}, r"keep=0\.25: set evict\.budget\.slots"),
        ("kivi_2bit", {}, "`store` must be plain; got Affine"),
        ("quest", {}, "`read` must be all; got Quest"),
        ("h2o_decode", {}, "EveryTokens"),
        ("adakv_snapkv", {"evict.budget.slots": 64}, "AdaKV: use uniform"),
        ("chunkkv", {"evict.budget.slots": 64}, "Chunk with reuse=.*use token"),
        ("kvzip", {"evict.budget": UNIFORM}, "KVzip reads it again"),
        ("cam", {"evict.budget.slots": 64, "schedule": "after_prefill"}, "merge=CaM"),
        ("vertical_slash", {}, "prefill=VerticalSlash.*Set prefill=dense"),
    ],
)
def test_what_cannot_be_repeated_is_refused(name, fields, said):
    c = kvjax.compression(name, **fields)
    with pytest.raises(ValueError, match=said):
        check_rolling(c)
    choice = CompressionChoice(compression=name, fields=fields)
    config = in_chunks(16, sampling=SamplingConfig(choices=(choice,)))
    with pytest.raises(ValueError, match=rf"sampling\.choices\[0\]: .*{said}"):
        check_shape(config, SHAPE)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"duo": DuoConfig()}, "`duo` need all tokens of a row"),
        ({"objective": ObjectiveConfig(hidden=1.0)}, r"`objective\.hidden`"),
        ({"objective": ObjectiveConfig(attention=1.0)}, r"`objective\.attention`"),
        ({"objective": ObjectiveConfig(distill_context=1.0)}, "distill_context"),
        ({"sampling": SamplingConfig(choice_gradient=0.5)}, "choice_gradient"),
    ],
)
def test_what_does_not_go_with_chunks_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        in_chunks(16, **fields)


def test_a_budget_below_what_is_protected_is_refused():
    choice = CompressionChoice(compression="snapkv", fields={"evict.budget.slots": 32})
    config = in_chunks(16, sampling=SamplingConfig(choices=(choice,)))
    with pytest.raises(ValueError, match=r"choices\[0\].*protects 64"):
        check_shape(config, SHAPE)
    with pytest.raises(ValueError, match="size` must be an integer >= 1; got 0"):
        ChunksConfig(size=0)
    tree = as_tree(in_chunks(16)) | {"chunks": {"sizes": 16}}
    with pytest.raises(ValueError, match="sizes.*size"):
        decode_recipe(tree)


def test_a_run_in_chunks(tmp_path):
    """From a recipe to a finished model."""
    choice = CompressionChoice(compression="knorm", fields={"evict.budget.slots": 24})
    config = in_chunks(
        32,
        sampling=SamplingConfig(choices=(choice,)),
        cached=CachedConfig(items=0),
        log_every=1,
    )
    state = run(config, tmp_path / "run")
    first = weights_of(config)[1]
    assert int(state.step) == config.steps
    assert all(bool(jnp.any(state.params[name] != first[name])) for name in first)
    assert (tmp_path / "run" / "model" / "config.json").exists()
