"""The generation loop: stop tokens, sampling, streaming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.eval.fidelity import fidelity
from kvjax.models import Decoder
from kvjax.models.sampling import Sampling
from tests.small import LENGTHS, batch, small_model

PROMPT, _, _ = batch()


def greedy(**fields):
    return kvjax.generate(small_model(), PROMPT, LENGTHS, max_new_tokens=24, **fields)


def test_stop_tokens_end_their_row_only():
    free = np.asarray(greedy().tokens)
    stop = int(free[0, 9])
    out = greedy(stop_tokens=[stop])
    for row, tokens in enumerate(np.asarray(out.tokens)):
        hits = np.flatnonzero(free[row] == stop)
        n = int(hits[0]) + 1 if len(hits) else 24
        assert int(out.lengths[row]) == n
        np.testing.assert_array_equal(tokens[:n], free[row, :n])
        assert (tokens[n:] == 0).all()


def test_callback_sees_every_token_as_it_is_made():
    seen = []
    out = greedy(callback=lambda tokens, lengths: seen.append((tokens, lengths)))
    assert [tokens.shape[1] for tokens, _ in seen] == list(range(1, 25))
    np.testing.assert_array_equal(seen[-1][0], out.tokens)
    np.testing.assert_array_equal(out.tokens, greedy().tokens)


@pytest.mark.slow
def test_generation_goes_on_from_its_own_cache():
    whole = np.asarray(greedy().tokens)
    logits, cache = kvjax.prefill(small_model(), PROMPT, LENGTHS, max_new_tokens=24)
    first = kvjax.generate_from(small_model(), cache, logits, max_new_tokens=10)
    np.testing.assert_array_equal(first.tokens, whole[:, :10])
    logits, cache = kvjax.extend(small_model(), first.cache, first.tokens[:, -1:])
    rest = kvjax.generate_from(small_model(), cache, logits[:, 0], max_new_tokens=14)
    np.testing.assert_array_equal(rest.tokens, whole[:, 10:])


def test_the_last_logits_alone():
    _, cache = kvjax.prefill(small_model(), PROMPT, LENGTHS, max_new_tokens=24)
    some, lengths = PROMPT[:, :20], np.minimum(LENGTHS, 20)
    every, cache_of_every = kvjax.extend(small_model(), cache, some, lengths)
    last, cache_of_last = kvjax.extend(small_model(), cache, some, lengths, last=True)
    rows = np.arange(len(lengths))
    assert last.shape == (len(lengths), 1, every.shape[-1])
    np.testing.assert_allclose(last[:, 0], every[rows, lengths - 1], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, cache_of_last, cache_of_every)


def test_sampling_is_a_function_of_the_key():
    key = jax.random.key(1)
    one, two = (greedy(temperature=1.0, key=key).tokens for _ in range(2))
    np.testing.assert_array_equal(one, two)
    other = greedy(temperature=1.0, key=jax.random.key(2)).tokens
    assert (np.asarray(one) != np.asarray(other)).any()


def draws(sampling: Sampling, logits, count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: sampling(logits, key)[0])(keys))


def test_top_k_and_top_p_cut_the_tail():
    weights = np.array([[0.5, 0.25, 0.15, 0.07, 0.03]])
    logits = jnp.log(jnp.asarray(weights, jnp.float32))
    assert set(draws(Sampling(temperature=1.0, top_k=2), logits)) == {0, 1}
    # 0.5 + 0.25 < 0.8: the token that crosses it stays.
    assert set(draws(Sampling(temperature=1.0, top_p=0.8), logits)) == {0, 1, 2}
    assert set(draws(Sampling(temperature=1.0, top_p=0.5), logits)) == {0}
    both = Sampling(temperature=1.0, top_k=2, top_p=0.9)
    assert set(draws(both, logits)) == {0, 1}


def test_temperature_shapes_the_distribution():
    weights = np.array([0.5, 0.3, 0.2])
    logits = jnp.log(jnp.asarray(weights, jnp.float32))[None]
    for temperature in (0.5, 1.0, 2.0):
        want = weights ** (1 / temperature)
        want = want / want.sum()
        got = draws(Sampling(temperature=temperature), logits)
        share = np.bincount(got, minlength=3) / got.size
        np.testing.assert_allclose(share, want, atol=0.03)  # 4 standard errors


def copied(dtype: str) -> Decoder:
    """A small model whose weights may be changed."""
    graph, params = nnx.split(small_model(dtype))
    return nnx.merge(graph, jax.tree.map(jnp.copy, params))


@pytest.mark.parametrize("run", ["generate", "stream", "simulate", "fidelity"])
def test_logits_that_overflow_are_an_error(run):
    """It names the dtype and the way out; a stream shows no token of them."""
    model, shown = copied("float16"), []
    for weight in (model.layers.mlp.up.kernel, model.layers.mlp.down.kernel):
        weight[...] = weight[...] * 10_000
    with pytest.raises(ValueError, match=r"float16.*dtype='bfloat16'"):
        if run == "simulate":
            kvjax.simulate(model, PROMPT, LENGTHS, LENGTHS - 20)
        elif run == "fidelity":
            fidelity(model, jnp.asarray(PROMPT[:, :40]), 30, kvjax.Compression())
        else:
            callback = (lambda *now: shown.append(now)) if run == "stream" else None
            kvjax.generate(model, PROMPT, LENGTHS, max_new_tokens=8, callback=callback)
    assert not shown


def test_logits_that_overflow_while_decoding_are_an_error():
    """Found in the loop, which ends there, and looked at once behind it."""
    model, fed = copied("float32"), 7
    model.embedding[...] = model.embedding[...].at[fed].set(jnp.nan)
    prompt = np.where(PROMPT == fed, fed + 1, PROMPT)
    logits, cache = kvjax.prefill(model, prompt, LENGTHS, max_new_tokens=24)
    first = np.full(logits.shape, -np.inf, np.float32)  # tokens may be ruled out
    first[[0, 1, 2], [fed + 2, fed + 2, fed]] = 0.0
    with pytest.raises(ValueError, match="row 2 of 3.*float32"):
        kvjax.generate_from(model, cache, jnp.asarray(first), max_new_tokens=2)
    out = kvjax.generate_from(model, cache, jnp.asarray(first), max_new_tokens=1)
    np.testing.assert_array_equal(out.tokens[:, 0], first.argmax(-1))
