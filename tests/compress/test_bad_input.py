"""Wrong input: named before any compute, with what was expected and what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import KVCache
from tests.small import LENGTHS, VOCAB, batch, preset, small_model

PROMPT, LATER, _ = batch()
EVERY = {"type": "every_tokens", "interval": 4}
LOW_RANK = {"type": "low_rank", "keep": 0.5}


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("snapkb", {}, "Did you mean 'snapkv'"),
        ("nowhere.yaml", {}, "no file at"),
        ("snapkv", {"evict.budget.kep": 0.1}, "Did you mean 'keep'"),
        ("snapkv", {"evit.budget.keep": 0.1}, "Did you mean 'evict'"),
        ("snapkv", {"evict.score.type": "snapk"}, "Did you mean 'snapkv'"),
        (
            "snapkv",
            {"evict.score.window": "wide"},
            "score.window` must be an integer",
        ),
        (
            "snapkv",
            {"evict.score.window": 0},
            "score.window` must be an integer",
        ),
        ("snapkv", {"evict.budget.keep": 0.0}, "must be a number in \\(0, 1\\]"),
        ("snapkv", {"evict.budget.keep": 1.01}, "keep = 1 - ratio"),
        (
            "snapkv",
            {"evict.budget.slots": 0},
            "budget.slots` must be an integer >= 1",
        ),
        ("snapkv", {"schedule": "every_token"}, "Did you mean 'every_tokens'"),
        (
            "kivi_2bit",
            {"store.keys.bits": 3},
            "keys.bits` must be one of \\[1, 2, 4, 8\\]",
        ),
        ("int8", {"store.keys.bits": 1}, "needs a bit for the sign"),
        ("kivi_2bit", {"store.residual": 40}, "multiple of the keys codec's group"),
        ("lowrank_keys", {"store.residual": 32}, "takes no later blocks"),
        ("none", {"schedule": {"type": "every_tokens"}}, "`evict` is not set"),
        ("adakv_snapkv", {"store.residual": 32}, "head-wise budgets"),
        ("decoupled", {"evict.values.keep": 0.75}, "must not be above"),
        ("duo", {"evict.budget.slots": 64}, "share of heads that keep everything"),
        (
            "duo",
            {"evict.budget.others": 0},
            "budget.others` must be an integer >= 1",
        ),
        ("duo", {"evict.unit": "chunk"}, "Use single tokens"),
        ("duo", {"schedule": "every_tokens"}, "head-wise budgets"),
        (
            "quest",
            {"read.page": 16, "read.keep": 1.5},
            "must be a number in \\(0, 1\\]",
        ),
        ("chunkkv", {"schedule": EVERY}, "works on single tokens in plain"),
        ("snapkv_kivi", {"schedule": EVERY}, "works on single tokens in plain"),
        ("adakv_snapkv", {"schedule": EVERY}, "the same slots in every head"),
        ("decoupled", {"schedule": EVERY}, "separate value budgets"),
        ("knorm", {"schedule": EVERY, "read": "quest"}, "exclude each other"),
        ("adakv_snapkv", {"read": "quest"}, "head-wise budgets"),
        ("adakv_snapkv", {"store.keys": LOW_RANK}, "head-wise budgets"),
        ("decoupled", {"read": "quest"}, "a separate budget for values excludes"),
        ("decoupled", {"store.keys": LOW_RANK}, "a separate budget for values"),
        ("decoupled", {"store.residual": 32}, "a separate budget for values"),
        ("lowrank_keys", {"read": "quest"}, "decodable by themselves"),
        ("kivi_2bit", {"read": {"type": "quest", "page": 16}}, "groups 32 slots"),
        ("int8", {"read": "quest", "store.residual": 8}, "multiple of the page size"),
    ],
)
def test_compressions(name, overrides, says):
    with pytest.raises(ValueError, match=says):
        kvjax.compression(name, **overrides)


@pytest.mark.parametrize(
    ("tokens", "lengths", "says"),
    [
        (PROMPT[0], None, "shape \\[B, T\\]"),
        (PROMPT.astype(np.float32), None, "must be integers"),
        (PROMPT[:, :0], None, "at least one row and one token"),
        (PROMPT + VOCAB, None, "the model's vocabulary"),
        (PROMPT - VOCAB, None, "the model's vocabulary"),
        (PROMPT, LENGTHS[:2], "`lengths` must be integers of shape"),
        (PROMPT, LENGTHS * 0, "Leave empty prompts out"),
        (PROMPT, np.array([112, 0, 97]), "row 1 has 0"),
        (PROMPT, LENGTHS + 1, "must be in \\[1, 112\\]"),
        (np.zeros((1, 1025), np.int32), None, "the model's range is 1024"),
    ],
)
def test_prompts(tokens, lengths, says):
    for call in (kvjax.prefill, kvjax.generate, kvjax.simulate):
        with pytest.raises(ValueError, match=says):
            call(small_model(), tokens, lengths)


def test_budgets_below_the_protected_window():
    for c in (
        kvjax.compression("snapkv", **{"evict.budget.slots": 32}),
        kvjax.compression("snapkv", **{"evict.budget.keep": 0.25}),
    ):
        with pytest.raises(ValueError, match="SnapKV protects 64.*lower the score's"):
            kvjax.prefill(small_model(), PROMPT, LENGTHS, c)


def test_budgets_in_bytes_below_one_slot():
    c = kvjax.compression("knorm", **{"evict.budget.bytes": 100})
    with pytest.raises(ValueError, match="less than one slot per head"):
        kvjax.prefill(small_model(), PROMPT, LENGTHS, c)


def test_a_name_is_not_a_compression():
    with pytest.raises(ValueError, match="must be a kvjax.Compression"):
        kvjax.prefill(small_model(), PROMPT, LENGTHS, "snapkv")  # type: ignore[arg-type]


def test_codecs_that_cannot_hold_the_heads():
    c = kvjax.compression("kivi_4bit", **{"store.values.group": 24})
    with pytest.raises(ValueError, match="must divide head_dim=32"):
        kvjax.prefill(small_model(), PROMPT, LENGTHS, c)


def test_generation_beyond_the_models_range():
    with pytest.raises(ValueError, match="Lower `max_new_tokens`"):
        kvjax.generate(small_model(), PROMPT, LENGTHS, max_new_tokens=1000)


@pytest.mark.parametrize("name", ["none", "kivi_2bit", "quest"])
def test_generation_past_capacity(name):
    _, cache = kvjax.prefill(
        small_model(), PROMPT, LENGTHS, preset(name), max_new_tokens=4
    )
    many = np.ones((3, 60), np.int32)
    with pytest.raises(ValueError, match="larger `max_new_tokens`"):
        kvjax.extend(small_model(), cache, many)

    @jax.jit
    def unchecked(cache, tokens):
        return kvjax.extend(small_model(), cache, tokens)[0]

    # Under jit nobody can be told: the row says so itself.
    assert np.isnan(np.asarray(unchecked(cache, many))).all()


def test_bounded_caches_have_no_capacity():
    c = preset("h2o_decode")
    _, cache = kvjax.prefill(small_model(), PROMPT, LENGTHS, c, max_new_tokens=1)
    assert cache.room is None
    logits, after = kvjax.extend(small_model(), cache, np.ones((3, 60), np.int32))
    assert np.isfinite(np.asarray(logits)).all()
    assert after.nbytes == cache.nbytes


def test_extensions():
    _, cache = kvjax.prefill(small_model(), PROMPT, LENGTHS)
    with pytest.raises(ValueError, match="one row per row of the cache"):
        kvjax.extend(small_model(), cache, LATER[:2, :1])
    with pytest.raises(ValueError, match="made by another model"):
        kvjax.extend(small_model(layers=1), cache, LATER[:, :1])
    with pytest.raises(ValueError, match="the model's vocabulary"):
        kvjax.extend(small_model(), cache, LATER[:, :1] + VOCAB)


def test_sampling():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1.0}, "must be a number >= 0"),
        ({"temperature": 1.0}, "needs a random key"),
        ({"top_k": 0}, "`top_k` must be an integer"),
        ({"top_p": 0.0}, "must be a number in \\(0, 1\\]"),
        ({"max_new_tokens": 0}, "integer in"),
    ]
    for wrong, says in cases:
        with pytest.raises(ValueError, match=says):
            kvjax.generate(small_model(), PROMPT, LENGTHS, **wrong)


def test_compression_points_of_the_parallel_form():
    for points, says in (
        (LENGTHS + 1, "must not be above"),
        (LENGTHS * 0, "at least 1"),
        (LENGTHS[:2], "shape"),
    ):
        with pytest.raises(ValueError, match=says):
            kvjax.simulate(small_model(), PROMPT, LENGTHS, points)


def test_prompts_read_for_another_method():
    from kvjax.models.prompts import read_prompt

    prompt = read_prompt(small_model(), PROMPT, LENGTHS, preset("knorm"))
    half = prompt.compress(preset("knorm").with_keep(0.5))
    assert isinstance(half, KVCache)
    with pytest.raises(ValueError, match="only the budget may change"):
        prompt.compress(preset("tova"))
    with pytest.raises(ValueError, match="no token budget"):
        preset("int8").with_keep(0.5)


def test_one_reading_serves_many_budgets():
    from kvjax.models.prompts import read_prompt

    prompt = read_prompt(small_model(), PROMPT, LENGTHS, preset("snapkv"))
    for keep in (0.25, 0.5):
        c = preset("snapkv").with_keep(keep)
        ours = prompt.compress(c, max_new_tokens=8)
        logits, direct = kvjax.prefill(
            small_model(), PROMPT, LENGTHS, c, max_new_tokens=8
        )
        np.testing.assert_allclose(prompt.logits, logits, atol=1e-5)
        assert jax.tree.structure(ours) == jax.tree.structure(direct)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(direct), strict=True):
            np.testing.assert_allclose(
                jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), atol=1e-5
            )


def test_a_prefix_is_a_cache():
    with pytest.raises(ValueError, match="`prefix` must be a KVCache"):
        kvjax.prefill(small_model(), PROMPT, LENGTHS, prefix=PROMPT)  # type: ignore
