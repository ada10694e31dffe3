"""References of probes: worked examples and exact properties."""

import numpy as np

from tests.reference import probes
from tests.reference.base import softmax
from tests.reference.held import turn
from tests.reference.rows import FREQUENCIES, D, H, K


def make_transformer(draw, layers: int, tied: bool) -> probes.Transformer:
    """A random one: 11 tokens, width 12, 4 query and 2 KV heads."""
    wide = {"embed": (11, 12), "norm": (12,)} | ({} if tied else {"head": (12, 11)})
    for n in range(layers):
        wide |= {f"{n}/attn_norm": (12,), f"{n}/mlp_norm": (12,), f"{n}/q": (12, H, D)}
        wide |= {f"{n}/k": (12, K, D), f"{n}/v": (12, K, D), f"{n}/o": (H, D, 12)}
        wide |= {f"{n}/gate": (12, 9), f"{n}/up": (12, 9), f"{n}/down": (9, 12)}
    weights = {name: 0.5 * draw.normal(size=shape) for name, shape in wide.items()}
    return probes.Transformer(weights, FREQUENCIES)


def test_gates_of_one_and_zero(draw):
    model, tokens = make_transformer(draw, 1, tied=True), draw.integers(0, 11, 14)
    ones = np.ones((1, K, 9))
    np.testing.assert_array_equal(model.forward(tokens, ones), model.forward(tokens))
    ones[0, :, 4] = 0
    # In one layer a token that is absent is one that is taken out, positions kept.
    w, keep = model.weights, np.delete(np.arange(14), 4)
    x = w["embed"][tokens]
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w["0/attn_norm"]
    q, k, v = (np.einsum("te,ehd->htd", normed, w[f"0/{n}"]) for n in "qkv")
    q, k = (turn(y, np.arange(14)[None], FREQUENCIES) for y in (q, k))
    mixed = np.zeros(12)
    for h in range(H):
        share = softmax(k[h // 2, keep] @ q[h, -1] / np.sqrt(D))
        mixed += share @ v[h // 2, keep] @ w["0/o"][h]
    y = x[-1] + mixed
    y = y + model._mlp(model._norm(y, "0/mlp_norm"), 0)
    want = model._norm(y, "norm") @ w["embed"].T
    np.testing.assert_allclose(model.forward(tokens, ones)[-1], want, atol=1e-12)
    changed = (model.forward(tokens, ones) != model.forward(tokens)).any(-1)
    assert not changed[:9].any() and changed[9:].all()


def test_slopes_are_those_of_the_likelihood(draw):
    model, tokens = make_transformer(draw, 2, tied=False), draw.integers(0, 11, 13)
    gates, way = draw.uniform(size=(2, K, 7)), draw.normal(size=(2, K, 7))
    slopes = probes.gate_slopes(model, tokens, gates)
    ends = [
        probes.mean_nll(model, tokens, 7, gates + x * way, from_prompt=True)
        for x in (1e-5, -1e-5)
    ]
    np.testing.assert_allclose((slopes * way).sum(), (ends[0] - ends[1]) / 2e-5, 1e-5)
    # Along one gate the slopes add up to what removing the token costs.
    nodes, weights = np.polynomial.legendre.leggauss(12)
    ends, total, gates = [], 0.0, np.ones((2, K, 7))
    for at in (0.0, 1.0):
        gates[1, 0, 3] = at
        ends.append(probes.mean_nll(model, tokens, 7, gates))
    for node, weight in zip(nodes, weights, strict=True):
        gates[1, 0, 3] = (node + 1) / 2
        total += weight / 2 * probes.gate_slopes(model, tokens, gates)[1, 0, 3]
    np.testing.assert_allclose(total, ends[1] - ends[0], rtol=1e-6)
    rest = probes.gate_slopes(model, tokens, gates, from_prompt=False)
    whole = probes.gate_slopes(model, tokens, gates)
    np.testing.assert_allclose(rest * 5 / 6, whole, atol=1e-9)


def test_kvzip_sinks_and_chunks(draw, row):
    _, k, _, positions, _ = row
    q, replay = draw.normal(size=(H, 9, D)), draw.normal(size=(K, 9, D))
    arguments = {"positions": positions, "q_positions": 100 + np.arange(9)}
    parts = []
    for start, end in ((0, 16), (16, 32)):
        weights = probes.kvzip_attention(
            q, k, replay, start=start, end=end, **arguments
        )
        seen = np.flatnonzero(weights.any((0, 1)))
        sinks = [] if start == 0 else list(range(4))
        np.testing.assert_array_equal(seen, [*sinks, *range(start, end)])
        assert (weights.sum(-1) < 1).all()
        score = probes.kvzip_chunk_scores(
            q, k, replay, start=start, end=end, **arguments
        )
        parts.append([score])
    scores = probes.kvzip_scores(np.array(parts), positions[None])
    assert (scores[..., :4] == 1 + np.max(parts)).all()
    assert (scores[..., 32:] == 0).all() and (scores[..., 4:32] > 0).all()
