"""Scores that run the model over the prompt again."""

import jax
import numpy as np
import pytest

import kvjax
from kvjax.models.inference import read_prompt
from kvjax.models.shared_pass import read_shared
from kvjax.scorers import CriticalKV, KVzip
from tests.compress.probing import (
    FAMILIES,
    KV_HEADS,
    LAYERS,
    LENGTHS,
    found,
    model_of,
    prompts,
    queries_and_keys,
    replays,
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
    c, model = preset(name), model_of()
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
        ({"chunk": 0}, "`chunk` must be an integer >= 1"),
        ({"overlap": -1}, "`overlap` must be an integer >= 0"),
        ({"ask": [3, -1]}, "`ask` must be token ids"),
        ({"ask": "Repeat"}, "KVzip.ask"),
        ({"n_sink": -1}, "`n_sink` must be an integer >= 0"),
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
