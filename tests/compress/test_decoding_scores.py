"""Scores for long replies: every kind of layer, and a loop in NumPy beside a cache."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.budgets import Uniform
from kvjax.cache import LayerCache
from kvjax.compress.config import Compression, Eviction
from kvjax.rope import Rope
from kvjax.schedules import EveryTokens
from kvjax.scorers import RKV, AbstractScorer, TriAttention
from kvjax.scorers import _rkv as rkv_module
from tests.compress.samples import (
    SPECS,
    Sample,
    compressed,
    decode_inputs,
    draw,
    layer_spec,
    prefix,
)
from tests.compress.scores.decoding import by_spread, in_place
from tests.compress.test_against_references import scores_of
from tests.reference.held import best
from tests.reference.rkv import rkv_scores
from tests.reference.triattention import query_statistics, triattention_scores

ATTEND = jax.jit(LayerCache.attend)
LENGTHS = (96, 61, 30)
ROPES = {
    "partial": Rope(head_dim=16, rotary_dim=8),
    "llama3": Rope(head_dim=16, kind="llama3", factor=8.0, original_max_positions=32),
    "yarn": Rope(
        head_dim=16, kind="yarn", factor=4.0, original_max_positions=32, rotary_dim=12
    ),
}
Scoring = Callable[..., np.ndarray]
"""`(q, k, positions, q_positions)` of all queries and of what is held: `[K, S]`."""


@pytest.mark.parametrize(
    "fields", [{"window": 20}, {"softcap": 2.0}, {"window": 9, "scale": 0.5}]
)
def test_rkv_sees_what_the_layer_sees(fields):
    """A window narrower than what votes, too: such a query pays nothing."""
    sample = draw(3, layer_spec(6, 2, 32, **fields), LENGTHS, width=104)
    options = {"sliding": fields.get("window"), "softcap": fields.get("softcap")}
    ours = scores_of(RKV(window=8, mix=0.5), sample, LENGTHS)
    for row, n in enumerate(LENGTHS):
        q, k, _ = sample.row(row)
        options["scale"] = sample.inputs.spec.scale
        theirs = rkv_scores(q, k, **in_place(sample, row), mix=0.5, **options)
        np.testing.assert_allclose(ours[row, :, :n], theirs, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_rkv_in_blocks_of_rows(monkeypatch, rows):
    sample = draw(4, layer_spec(4, 2, 16), LENGTHS)
    whole = scores_of(RKV(), sample, LENGTHS)
    monkeypatch.setattr(rkv_module, "LOGITS_BUDGET", rows * 3 * 2 * max(LENGTHS))
    blocks = scores_of(RKV(), sample, LENGTHS)
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(blocks[row, :, :n], whole[row, :, :n], rtol=1e-5)


def test_rkv_spares_the_newest_of_like_keys():
    """All of them point at it, and leave it out."""
    sample = draw(5, layer_spec(4, 2, 16), (40,))
    k = sample.inputs.k.at[:, :, 3:9].set(sample.inputs.k[:, :, :1])
    inputs = dataclasses.replace(sample.inputs, k=k)
    score = RKV(mix=0.0, threshold=0.99)
    scores = scores_of(score, Sample(inputs, sample.lengths), (20,))[0]
    alike = [0, *range(3, 9)]
    assert (scores[:, alike[:-1]] < scores[:, alike[-1:]]).all()


def with_single_channels(x: np.ndarray, rope: Rope, turned: float = 1.0) -> np.ndarray:
    """Channels beside RoPE as pairs whose second half is 0; the others times `turned`.

    That makes of an embedding of some channels one of all, which the reference knows.
    """
    half, rest = rope.width // 2, x[..., rope.width :]
    first, second = x[..., :half] * turned, x[..., half : rope.width] * turned
    return np.concatenate([first, rest, second, np.zeros_like(rest)], axis=-1)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("normalise", [False, True])
def test_triattention_under_every_rope(kind, normalise):
    rope = ROPES[kind]
    spec = layer_spec(4, 2, 16, rope=rope)
    sample = draw(6, spec, LENGTHS, width=104)
    rest = np.zeros(rope.head_dim - rope.width)
    frequencies = np.concatenate([rope.frequencies(), rest])
    scaling = np.concatenate([np.full(rope.width // 2, rope.magnitude), rest + 1.0])
    score = TriAttention(normalise=normalise)
    ours = scores_of(score, sample, LENGTHS)
    for row, n in enumerate(LENGTHS):
        q, k, _ = sample.row(row)
        q, k = (with_single_channels(x, rope, 1 / rope.magnitude) for x in (q, k))
        at = in_place(sample, row)
        theirs = triattention_scores(
            k,
            *query_statistics(q, at["q_positions"], frequencies),
            positions=at["positions"],
            frequencies=frequencies,
            scaling=scaling,
            start=n,
            n_offsets=score.n_offsets,
            normalise=normalise,
            group="max",
        )
        by_spread(ours[row, :, :n], theirs)


def test_triattention_of_one_query_is_its_product():
    """If all queries are one before RoPE, a score is its product far ahead."""
    spec, n = layer_spec(2, 2, 16), 30
    sample = draw(7, spec, (n,))
    rng = np.random.default_rng(7)
    plain = jnp.asarray(rng.normal(size=(1, 2, 1, 16)), jnp.float32)
    places = jnp.arange(n)
    q = spec.rope.rotate(jnp.repeat(plain, n, 2), places)
    inputs = dataclasses.replace(sample.inputs, q=q)
    score = TriAttention(n_offsets=4, normalise=False)
    ours = scores_of(score, Sample(inputs, sample.lengths), (n,))
    later = spec.rope.rotate(jnp.repeat(plain, 4, 2), n + jnp.array([1, 2, 4, 8]))
    theirs = jnp.einsum("BHTD,BHSD->BHS", later, inputs.k) / 4
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def rkv_of(q, k, positions, q_positions) -> np.ndarray:
    given = {"positions": positions, "q_positions": q_positions}
    return rkv_scores(q, k, **given, mix=0.5)


def triattention_of(q, k, positions, q_positions) -> np.ndarray:
    """At the default base of RoPE."""
    frequencies = Rope(head_dim=k.shape[-1]).frequencies()
    return triattention_scores(
        k,
        *query_statistics(q, q_positions, frequencies),
        positions=positions,
        frequencies=frequencies,
        start=q_positions[-1] + 1,
        n_offsets=17,
        normalise=True,
        group="max",
    )


def loop(
    q, k, scoring: Scoring, prompt: int, slots: int, interval: int
) -> list[list[np.ndarray]]:
    """Positions held by every head after the prompt and after each later token.

    The prompt, and from then on every `interval` tokens, is cut to the best `slots`.
    """

    def cut(held: list[np.ndarray], stop: int) -> list[np.ndarray]:
        positions = np.stack(held)
        keys = np.stack([k[n, at] for n, at in enumerate(held)])
        scores = scoring(q[:, :stop], keys, positions, np.arange(stop))
        pairs = zip(scores, positions, strict=True)
        return [np.sort(at[best(row, at, slots)]) for row, at in pairs]

    held = cut([np.arange(prompt)] * len(k), prompt)
    trace = [held]
    for stop in range(prompt + 1, q.shape[1] + 1):
        held = [np.append(at, stop - 1) for at in held]
        if (stop - prompt) % interval == 0:
            held = cut(held, stop)
        trace.append(held)
    return trace


LOOPS: dict[str, tuple[AbstractScorer, Scoring]] = {
    "rkv": (RKV(mix=0.5), rkv_of),
    "triattention": (TriAttention(), triattention_of),
}


@pytest.mark.sweep(2, 6)
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(("slots", "interval"), [(24, 5), (12, 8), (16, 1)])
def test_decode_loop(name, slots, interval):
    score, scoring = LOOPS[name]
    spec, steps, prompts = SPECS["d16_g2"], 24, np.array([40, 9, 29])
    whole = draw(8, spec, tuple(prompts + steps))
    evict = Eviction(score=score, budget=Uniform(slots=slots))
    c = Compression(evict=evict, schedule=EveryTokens(interval=interval))
    cache = compressed(prefix(whole, prompts), c)
    traces = [
        loop(*whole.row(row)[:2], scoring, n, slots, interval)
        for row, n in enumerate(prompts)
    ]
    for step in range(steps + 1):
        parts = (cache.parts[0].live_positions(), cache.tail.live_positions())
        for row, trace in enumerate(traces):
            for head, want in enumerate(trace[step]):
                held = np.concatenate([part[row][head] for part in parts])
                np.testing.assert_array_equal(np.sort(held), want)
        if step < steps:
            _, cache = ATTEND(cache, decode_inputs(whole, prompts, step))
