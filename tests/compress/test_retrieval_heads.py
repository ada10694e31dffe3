"""Budgets by gates: which heads keep what, what is attended, and real bytes."""

import jax
import numpy as np
import pytest

import kvjax
from kvjax.cache import LayerCache, Ragged
from kvjax.models.config import read_gates
from kvjax.models.gates import with_gates
from tests import reference
from tests.compress.samples import compressed, decode_inputs, draw, layer_spec, prefix
from tests.small import HEAD_DIM, LENGTHS, ROWS, batch, gates, preset, small_model

# One layer all streaming and one all retrieval at a half; distinct numbers.
GATES = {
    "mixed": np.array([[0.9, 0.2], [0.4, 0.7]]),
    "by layer": np.array([[0.1, 0.3], [0.8, 0.6]]),
}


def duo(keep: float, sink: int, recent: int) -> kvjax.Compression:
    fields = {"score.n_sink": sink, "budget.keep": keep, "budget.others": sink + recent}
    return kvjax.compression("duo", **{f"evict.{k}": v for k, v in fields.items()})


@pytest.mark.parametrize(
    ("which", "keep", "recent"),
    [("mixed", 0.5, 32), ("by layer", 0.25, 5), ("by layer", 0.5, 200)],
)
def test_heads_keep_what_their_gates_say(which, keep, recent):
    prompt, _, _ = batch()
    model = with_gates(small_model(), GATES[which])
    _, cache = kvjax.prefill(model, prompt, LENGTHS, duo(keep, 4, recent))
    for row, n in enumerate(LENGTHS):
        wanted = reference.duo_kept(
            GATES[which], int(n), sparsity=1 - keep, sink=4, recent=recent
        )
        for layer in range(2):
            pairs = zip(cache.kept_positions(layer)[row], wanted[layer], strict=True)
            for ours, theirs in pairs:
                np.testing.assert_array_equal(ours, theirs)


def test_the_share_of_heads_is_rounded_up():
    held = small_model().config.layers
    heads = [rank for spec in held for rank in spec.head_ranks]
    assert sorted(heads) == [0, 1, 2, 3]
    order = np.argsort(-np.ravel(gates(2, 2)))
    assert [heads[i] for i in order] == [0, 1, 2, 3]
    prompt, _, _ = batch()
    _, cache = kvjax.prefill(small_model(), prompt, LENGTHS, duo(0.3, 4, 8))
    kept = [len(h) for layer in range(2) for h in cache.kept_positions(layer)[0]]
    assert sorted(kept) == [12, 12, 112, 112]
    tied = with_gates(small_model(), np.full((2, 2), 0.5))
    assert [spec.head_ranks for spec in tied.config.layers] == [(0, 1), (2, 3)]


def test_later_tokens_attend_to_what_their_heads_keep():
    ranks = [(3, 0), (1, 2)]
    specs = tuple(layer_spec(4, 2, 16, num_layers=2, head_ranks=x) for x in ranks)
    whole, start = draw(5, specs[0], (70, 58)), np.array([66, 54])
    prompt = prefix(whole, start)
    layer = compressed(prompt, duo(0.5, 3, 9), room=4, specs=specs)
    attend = jax.jit(LayerCache.attend)
    for step in range(2):
        out, layer = attend(layer, decode_inputs(whole, start, step))
        for row, n in enumerate(start):
            q, k, v = (x[:, : n + step + 1] for x in whole.row(row))
            ends = np.concatenate([np.arange(3), np.arange(n - 9, n + step + 1)])
            kept = [ends, np.arange(n + step + 1)]
            want = reference.attend_kept(q[:, -1:], k, v, kept)
            np.testing.assert_allclose(out[row], want, atol=1e-5)
            whole_too = reference.attend_kept(q[:, -1:], k, v, [kept[1]] * 2)
            assert np.abs(want - whole_too)[:2].max() > 1e-2


@pytest.mark.parametrize("which", GATES)
def test_streaming_heads_free_their_memory(which):
    """Keys, values and positions of the kept tokens, and the offsets; no more."""
    prompt, _, _ = batch()
    model = with_gates(small_model(), GATES[which])
    lengths = np.full(ROWS, LENGTHS[0])
    _, cache = kvjax.prefill(model, prompt, lengths, duo(0.5, 4, 12))
    slot = 2 * 4 * HEAD_DIM + 4
    for held, layer in zip(GATES[which], cache.layers, strict=True):
        (body,) = layer.parts
        assert isinstance(body, Ragged)
        tokens = sum(112 if gate > 0.5 else 16 for gate in held)
        got = sum(x.nbytes for x in (body.keys.data, body.values.data, body.positions))  # type: ignore
        assert got == ROWS * tokens * slot
        assert body.offsets.nbytes == ROWS * 3 * 4


def test_a_model_without_gates_is_told_what_to_do():
    prompt, _, _ = batch()
    plain = with_gates(small_model(), np.zeros((0, 0)))
    for run in (kvjax.prefill, kvjax.simulate):
        with pytest.raises(ValueError, match="no gates.*finetune --config duo"):
            run(plain, prompt, LENGTHS, c=preset("duo"))


def test_sinks_need_slots():
    prompt, _, _ = batch()
    c = kvjax.compression("duo", **{"evict.budget.others": 3})
    with pytest.raises(ValueError, match="3 slots.*protects 4"):
        kvjax.prefill(small_model(), prompt, LENGTHS, c)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([[0.5, 0.5]], "2 rows"),
        ([[0.5], [0.5]], "2 numbers"),
        ([[0.5, 1.5], [0.0, 0.0]], r"in \[0, 1\]; got 1.5"),
        ([[0.5, float("nan")], [0.0, 0.0]], "got nan"),
    ],
)
def test_gates_that_do_not_fit_the_model(wrong, says):
    with pytest.raises(ValueError, match=says):
        with_gates(small_model(), np.array(wrong))
    with pytest.raises(ValueError, match="list of numbers per layer"):
        read_gates([0.5, 0.5])
