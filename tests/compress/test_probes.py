"""Scores that run the model over the prompt again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.compress.survey import plans_of
from kvjax.models.probing import Rereading
from kvjax.models.prompts import read_prompt
from kvjax.models.shared_pass import read_shared
from kvjax.scorers import CriticalKV, KVzip, Oracle
from kvjax.types import loops_of
from tests.compress.probing import (
    FAMILIES,
    KV_HEADS,
    LAYERS,
    LENGTHS,
    V,
    found,
    method,
    model_of,
    prompts,
    queries_and_keys,
    replays,
    transformer,
)
from tests.reference import probes
from tests.small import assert_forms_agree, preset, small_model

ZIPS = {
    "chunks": KVzip(chunk=8, overlap=3, ask=(1, 2)),
    "one chunk": KVzip(chunk=64, n_sink=2),
    "chunks below sinks": KVzip(chunk=3, overlap=8, n_sink=4),
    "no sinks": KVzip(chunk=13, overlap=0, n_sink=0),
}


@pytest.mark.parametrize(
    ("family", "case"), [("windows", "chunks"), *(("plain", case) for case in ZIPS)]
)
def test_kvzip_is_the_reference(family, case, tolerance):
    model, score = model_of(**FAMILIES[family]), ZIPS[case]
    ours = found(model, score)
    for row, n in enumerate(LENGTHS):
        places = np.tile(np.arange(n), (KV_HEADS, 1))
        chunks = []
        for start, end, tokens, _ in replays(score, row):
            whole = queries_and_keys(model, [*prompts()[row, :n], *tokens])
            last = n + len(tokens)
            chunks.append(
                [
                    probes.kvzip_chunk_scores(
                        q[:, n:last],
                        k[:, :n],
                        k[:, n:last],
                        positions=places,
                        q_positions=np.arange(n, last),
                        start=start,
                        end=end,
                        n_sink=score.n_sink,
                        sliding=spec.window,
                        softcap=spec.softcap,
                    )
                    for spec, (q, k) in zip(model.config.layers, whole, strict=True)
                ]
            )
        held = np.broadcast_to(places, (LAYERS, KV_HEADS, n))
        want = probes.kvzip_scores(np.array(chunks), held, n_sink=score.n_sink)
        near = tolerance("float32")
        np.testing.assert_allclose(ours[:, row, :, :n], want, **near)


def missed(model: probes.Transformer, tokens, first: int, gates) -> float:
    """Negative log-likelihood of the tokens from `first` on, summed."""
    logits = model.forward(tokens, gates)[first - 1 : -1]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logs[np.arange(len(logs)), np.asarray(tokens)[first:]].sum()


ORACLES = {
    "chunks": Oracle(chunk=8, overlap=3, ask=(1, 2)),
    "no overlap": Oracle(chunk=8, overlap=0),
    "one chunk": Oracle(chunk=64),
}


@pytest.mark.parametrize("case", ORACLES)
def test_oracle_is_the_slope_of_the_likelihood(case, tolerance):
    model, score = model_of(), ORACLES[case]
    ours, theirs = found(model, score), transformer(model)
    for row, n in enumerate(LENGTHS):
        prompt = prompts()[row, :n].tolist()
        if score.chunk > n and not score.ask:
            ones = np.ones((LAYERS, KV_HEADS, n))
            twice = prompt + prompt
            want = -probes.gate_slopes(theirs, twice, ones, from_prompt=False)
        else:
            want = -slopes_of_replays(theirs, prompt, list(replays(score, row)))
        near = tolerance("float32")
        np.testing.assert_allclose(ours[:, row, :, :n], want, **near)
        assert np.abs(want).max() > 1e-2
        assert not ours[:, row, :, n:].any()


def slopes_of_replays(model: probes.Transformer, prompt, chunks, step=1e-4):
    """Central differences `[L, K, S]` of the mean loss of all chunks' own tokens."""
    n = len(prompt)
    slopes = np.zeros((LAYERS, KV_HEADS, n))
    # What nothing of the replay leads in is told by the prompt.
    begin = [(tokens, n + max(first, 1)) for _, _, tokens, first in chunks]
    count = sum(n + len(tokens) - first for tokens, first in begin)
    for index in np.ndindex(slopes.shape):
        for sign in (1.0, -1.0):
            gates = np.ones(slopes.shape)
            gates[index] += sign * step
            for tokens, first in begin:
                loss = missed(model, [*prompt, *tokens], first, gates)
                slopes[index] += sign * loss / (2 * step * count)
    return slopes


def test_gates_of_a_replay_are_factors_on_weights(tolerance):
    """Any gates at all, not only near 1."""
    model, rng = model_of(), np.random.default_rng(3)
    n, c = 13, method(Oracle())
    tokens, replay = prompts()[1:2, :n], rng.integers(0, V, (1, 6)).astype(np.int32)
    seen = read_prompt(model, tokens, None, c).seen
    loops = loops_of(model.config.layers, plans_of(c, model.config.layers, 16))
    lengths, places = jnp.array([n]), n + jnp.arange(6, dtype=jnp.int32)[None]
    again = Rereading(model=model, lengths=lengths, loops=loops, seen=seen)
    gates = rng.uniform(0, 2, again.shape)
    gates[rng.uniform(size=gates.shape) < 0.3] = 0.0
    ours = again(
        jnp.asarray(replay), places, gates=jnp.asarray(gates, jnp.float32)
    ).logits
    whole = [*tokens[0], *replay[0]]
    want = transformer(model).forward(whole, gates[:, 0, :, :n])[n:]
    near = tolerance("float32")
    np.testing.assert_allclose(ours[0], want, **near)
    far = transformer(model).forward(whole)[n:]
    assert np.abs(want - far).max() > 0.1


PROBES = [name for name in kvjax.compressions() if preset(name).probes]


@pytest.mark.parametrize("name", PROBES)
def test_what_was_read_is_compressed_as_in_one_program(name):
    tokens = np.random.default_rng(0).integers(0, 61, (2, 64)).astype(np.int32)
    lengths, model = np.array([64, 50]), small_model()
    prompt = read_prompt(model, tokens, lengths, preset(name))
    c = preset(name).with_keep(0.5)
    run = jax.jit(lambda x, n: kvjax.prefill(model, x, n, c)[1])
    ours, theirs = prompt.compress(c), run(tokens, lengths)
    for layer in range(2):
        both = ours.kept_positions(layer), theirs.kept_positions(layer)
        for one, other in zip(*both, strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)


def test_other_layers_may_have_other_scores():
    other = {
        "score": {"type": "snapkv", "window": 8},
        "budget": {"type": "ada", "keep": 0.25},
    }
    changes = {"layers": [{"first": 0, "stop": 1, "evict": other}]}
    changes |= {"evict.score.chunk": 32, "evict.budget.keep": 0.5}
    assert_forms_agree(small_model(), kvjax.compression("kvzip", **changes))


@pytest.mark.parametrize("name", PROBES)
def test_a_shared_pass_is_none_over_the_prompt_again(name):
    c, model = preset(name).with_keep(1.0), model_of()
    passed = read_shared(model, prompts(), LENGTHS, c.prefill)
    with pytest.raises(ValueError, match="Use `read_prompt"):
        passed.prompt(c)


@pytest.mark.parametrize("name", PROBES)
def test_prefixes_are_not_read_again(name):
    model, c = model_of(), preset(name).with_keep(1.0)
    _, front = kvjax.prefill(model, prompts()[:1, :4])
    with pytest.raises(ValueError, match="Put the prefix into the prompts"):
        kvjax.prefill(model, prompts(), LENGTHS, c, prefix=front)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"chunk": 0}, "chunk` must be an integer"),
        ({"overlap": -1}, "overlap` must be an integer"),
        ({"ask": [3, -1]}, "ask.1` must be an integer >= 0.*tokenizer"),
        ({"ask": "Repeat"}, "ask"),
        ({"n_sink": -1}, "n_sink` must be an integer >= 0"),
    ],
)
def test_bad_hyper_parameters(fields, says):
    with pytest.raises(ValueError, match=says):
        kvjax.compression("kvzip", **{f"evict.score.{k}": x for k, x in fields.items()})


def test_what_reads_the_prompt_once_cannot_read_it_again():
    with pytest.raises(ValueError, match="got KVzip, which reads it again"):
        CriticalKV(base=KVzip())
    with pytest.raises(ValueError, match="needs a score of tokens as they come"):
        kvjax.compression("snapkv_decode", **{"evict.score": {"type": "kvzip"}})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ask": [9999]}, "`ask` must be ids of the model's 61 tokens; got 9999"),
        ({"chunk": 600}, "up to position 1200; the model's range is 1024"),
        ({"chunk": 500, "ask": [1]}, "up to position 1109"),
    ],
)
def test_what_is_told_must_fit_the_model(fields, says):
    """Before anything is computed; smaller chunks fit."""
    tokens = np.ones((1, 600), np.int32)
    fields = {f"evict.score.{name}": value for name, value in fields.items()}
    c = kvjax.compression("kvzip", **fields)
    with pytest.raises(ValueError, match=says):
        kvjax.prefill(small_model(), tokens, None, c)
