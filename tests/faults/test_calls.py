"""Calls in Python with what they do not take: named before any compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.models.generation import generate_from
from kvjax.models.sampling import Sampling
from tests.small import VOCAB, small_model

TOKENS = np.arange(8)[None]


@pytest.mark.parametrize("name", ["prefill", "generate", "simulate"])
@pytest.mark.parametrize(
    "tokens",
    [
        TOKENS.astype(np.int64) + 2**32,
        TOKENS.astype(np.uint64) + 2**32,
        TOKENS - 2**33,
        [[10**30]],
        [["a"]],
        [[1, 2], [3]],
        "hello",
        None,
        {"input_ids": [[1]]},
        np.array([["2026-01-01"]], "M8[D]"),
        [[True, False]],
    ],
    ids=repr,
)
def test_tokens_that_are_none(name, tokens):
    """Those of 64 bits used to be what their lower halves are."""
    with pytest.raises(ValueError, match="`tokens` must be") as said:
        getattr(kvjax, name)(small_model(), tokens)
    assert len(str(said.value)) < 600


@pytest.mark.parametrize("lengths", [[2**32 + 8], [10**30], ["a"], [8.0], None])
def test_lengths_that_are_none(lengths):
    if lengths is not None:
        with pytest.raises(ValueError, match="`lengths` must be"):
            kvjax.prefill(small_model(), TOKENS, lengths)
        with pytest.raises(ValueError, match="`prompt_lengths` must"):
            kvjax.simulate(small_model(), TOKENS, prompt_lengths=lengths)
    for model in (None, "kvjax-tiny", small_model().config):
        with pytest.raises(ValueError, match="`model` must be a kvjax Decoder"):
            kvjax.prefill(model, TOKENS, lengths)  # type: ignore[arg-type]


def test_room_is_bounded_by_the_models_range():
    model = small_model()

    def shapes(room: int) -> list[tuple[int, ...]]:
        made = jax.eval_shape(lambda: kvjax.prefill(model, TOKENS, max_new_tokens=room))
        return [x.shape for x in jax.tree.leaves(made)]

    assert shapes(10**9) == shapes(model.config.max_positions)


def test_caches_and_logits_of_something_else():
    model = small_model()
    logits, cache = kvjax.prefill(model, TOKENS, max_new_tokens=4)
    for wrong in (None, logits, (logits, cache)):
        with pytest.raises(ValueError, match="`cache` must be a KVCache"):
            kvjax.extend(model, wrong, TOKENS)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`cache` must be a KVCache"):
            generate_from(model, wrong, logits)  # type: ignore[arg-type]
    for wrong in (None, [1.0], logits[0], logits[:, :7], jnp.tile(logits, (2, 1))):
        with pytest.raises(ValueError, match=rf"`logits` .*\[1, {VOCAB}\]"):
            generate_from(model, cache, wrong, max_new_tokens=2)  # type: ignore
    with pytest.raises(ValueError, match="`callback` must be a function"):
        kvjax.generate(model, TOKENS, callback=3)  # type: ignore[arg-type]
    key = jnp.zeros((3,), jnp.uint32)
    with pytest.raises(ValueError, match="`key` must be a random key"):
        kvjax.generate(model, TOKENS, temperature=1.0, key=key)


def test_a_tiny_top_p_takes_the_likeliest_token():
    logits = jnp.asarray([[0.0, 1.0, 9.0, 2.0]])
    for top_p in (1e-6, 1e-30):
        draw = Sampling(temperature=1.0, top_p=top_p)
        assert draw(logits, jax.random.key(0)).tolist() == [2]


@pytest.mark.parametrize(
    "changed",
    [
        {"prefill": {"type": "vertical_slash", "last_q": 2**31 - 1}},
        {"prefill": {"type": "vertical_slash", "block": 16384}},
        {"store.residual": 2**20},
        {"schedule": {"type": "every_tokens", "interval": 10**6}},
        {
            "evict": {
                "score": {"type": "lagkv", "lag": 2**20},
                "budget": {"type": "uniform", "keep": 1},
            }
        },
        {"store.keys": {"type": "think", "window": 2**27}},
    ],
    ids=repr,
)
def test_sizes_that_no_prompt_has(changed):
    """They were allocated as they stood: gigabytes for a prompt of nineteen tokens."""
    with pytest.raises(ValueError, match="must be an integer in"):
        kvjax.compression("none", **changed)
