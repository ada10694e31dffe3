"""When tokens leave: looked at step by step, against caches made in one go."""

import jax
import numpy as np
import pytest

import kvjax
from kvjax.eval.departures import STAYED, Departures, Watch, departures
from kvjax.eval.report import departure_figure, departure_map
from kvjax.eval.report.leaving import lifetimes
from tests.eval import tiny

STEPS = 6
C = kvjax.compression(
    "h2o_decode", **{"evict.budget.slots": 10, "evict.score.recent": 4}
)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(3), (24 + STEPS,), 4, 100))


@pytest.fixture(scope="module")
def found(model, tokens):
    return departures(model, tokens[:24], C, steps=STEPS, follow=tokens[24:])


def test_it_is_what_the_caches_hold(model, tokens, found):
    prompt = tokens[None, :24]
    _, cache = kvjax.prefill(model, prompt, None, C, max_new_tokens=STEPS + 1)
    _, last = kvjax.extend(model, cache, tokens[None, 24:])
    assert found.times == tuple(range(STEPS + 1)) and found.prompt == 24
    assert found.tokens.tolist() == tokens.tolist()
    for layer, left in enumerate(found.left):
        for head, mine in enumerate(left):
            at_first = cache.kept_positions(layer)[0][head]
            assert np.flatnonzero(mine[:24] != 0).tolist() == at_first.tolist()
            at_last = last.kept_positions(layer)[0][head]
            assert np.flatnonzero(mine == STAYED).tolist() == at_last.tolist()
    # The budget is full from the start: each token that comes drives one out.
    every = np.concatenate(found.left)
    assert [(every == time).sum(axis=1).tolist() for time in range(1, STEPS + 1)] == [
        [1] * len(every)
    ] * STEPS
    assert found.held(0).sum() == pytest.approx(10)


def test_of_what_the_model_says_itself(model, tokens, found):
    own = departures(model, tokens[None, :24], C, steps=STEPS)
    assert own.times == found.times
    assert (own.tokens[:24] == tokens[:24]).all()
    out = kvjax.generate(model, tokens[None, :24], None, C, max_new_tokens=STEPS)
    assert own.tokens[24:].tolist() == out.tokens[0].tolist()


def test_a_look_without_tokens_is_none(model, tokens):
    _, cache = kvjax.prefill(
        model, tokens[None, :24], None, C, max_new_tokens=STEPS + 1
    )
    watch = Watch(cache, 0, tokens[:24])
    watch.look(cache, [])
    assert watch.seen().times == (0,)


def test_bad_input(model, tokens):
    with pytest.raises(ValueError, match="one prompt"):
        departures(model, tokens.reshape(2, -1), C)
    with pytest.raises(ValueError, match="`follow` has 6 tokens, and `steps` is 64"):
        departures(model, tokens[:24], C, follow=tokens[24:])
    with pytest.raises(ValueError, match="steps"):
        departures(model, tokens[:24], C, steps=0)


def test_shares_of_time():
    left = np.array([[0, STAYED, 2, STAYED, 3, 2]])  # four of the prompt, two later
    made = Departures(tokens=np.arange(6), prompt=4, times=(0, 1, 2), left=(left,))
    np.testing.assert_allclose(lifetimes(made)[0], [[0, 1, 2 / 3, 1, 1, 0]])
    np.testing.assert_array_equal(made.held(0), [0, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(made.held(2), [0, 1, 0, 1, 1, 0])
    pieces = ["a", " b", " c", "", " d", " $e"]
    assert departure_map(made, pieces)._repr_png_()[:4] == b"\x89PNG"
    assert departure_figure(made, title="$a")._repr_png_()[:4] == b"\x89PNG"
