"""References of budgets over all layers: worked examples and exact properties."""

import numpy as np
import pytest

from tests.reference import layer_budgets as budgets
from tests.reference.rows import K, S

RULES = {
    "largest_remainder": budgets.largest_remainder,
    "highest_averages": budgets.highest_averages,
}


@pytest.mark.parametrize("rule", RULES)
def test_budgets_sum_and_stay_in_bounds(draw, rule):
    for _ in range(200):
        layers, least = draw.integers(1, 9), draw.integers(0, 4)
        most = draw.integers(4, 40, layers)
        total = int(draw.integers(least * layers, most.sum() + 3))
        preference = draw.gamma(1, size=layers) * draw.integers(0, 2, layers)
        got = RULES[rule](preference, total, least=least, most=most)
        assert got.sum() == min(total, most.sum())
        assert (got >= least).all() and (got <= most).all()
        exact = budgets.shares(preference, total, least=least, most=most)
        assert np.abs(got - exact).max() < (1.0 if rule == "largest_remainder" else 2.0)


def test_budget_examples():
    by_rest = budgets.largest_remainder(np.array([3.0, 2.0, 2.0]), 8, least=0, most=9)
    np.testing.assert_array_equal(by_rest, [4, 2, 2])
    # The first layer is full at 5; the others share what is left as 2 to 1.
    full = budgets.largest_remainder(
        np.array([9.0, 2.0, 1.0]), 14, least=1, most=np.array([5, 20, 20])
    )
    np.testing.assert_array_equal(full, [5, 6, 3])
    # A third layer comes and the first one gets more, which a cascade cannot give.
    two, three = np.array([7.0, 12.0]), np.array([7.0, 12.0, 1.0])
    before = budgets.largest_remainder(two, 4, least=0, most=9)
    after = budgets.largest_remainder(three, 4, least=0, most=9)
    assert (before.tolist(), after.tolist()) == ([1, 3], [2, 2, 0])
    before = budgets.highest_averages(two, 4, least=0, most=9)
    after = budgets.highest_averages(three, 4, least=0, most=9)
    assert (before.tolist(), after.tolist()) == ([1, 3], [1, 3, 0])


def test_cascade_is_one_shot(draw):
    for trial in range(40):
        layers, flat = int(draw.integers(2, 7)), trial % 2 == 0
        scores = draw.normal(size=(layers, K, S))
        scores[:, :, -4:] = np.inf
        positions = np.tile(np.arange(S), (layers, K, 1))
        arguments = (scores, positions, draw.gamma(1, size=layers), 12 * layers)
        options = {"least": 1, "most": S - 4, "flat": flat}
        rule = budgets.highest_averages
        once, want = budgets.layers_at_once(*arguments, rule=rule, **options)
        slowly, got, peak = budgets.layers_in_cascade(*arguments, rule=rule, **options)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.array(slowly), np.array(once))
        assert np.sum(once) == K * (12 + 4) * layers
        assert peak <= K * (12 + 4) * layers + K * S


def test_cake_preference_example(row):
    q, k, _, positions, places = row
    still = np.zeros_like(q)  # every query looks at all that it sees
    preference, entropy, variance = budgets.cake_preference(
        still, k, positions=positions, q_positions=places, window=4
    )
    lengths = np.arange(S - 3, S + 1)
    np.testing.assert_allclose(
        entropy, np.mean((S - 4) / lengths * np.log(lengths)), rtol=1e-12
    )
    np.testing.assert_allclose(variance, (S - 4) * np.var(1 / lengths, ddof=1))
    assert np.isclose(preference, entropy * variance)
    two = budgets.cake_preference(
        q, k, positions=positions, q_positions=places, window=4, tau1=2.0, tau2=0.5
    )
    np.testing.assert_allclose(two[0], two[1] ** 0.5 * two[2] ** 2)


def test_lava_preference_is_one_for_even_scores():
    scores = np.ones((2, 6))
    scores[:, -1] = np.inf
    assert np.isclose(budgets.lava_preference(scores), 1.0)
    scores[:, :5] = 1e-12
    scores[0, 2] = 1.0
    assert budgets.lava_preference(scores) < 1e-8


def test_adakv_global_sums_exactly_and_leaves_no_head_empty(draw):
    for _ in range(20):
        scores = draw.normal(size=(3, K, S)) * draw.gamma(0.3, size=(3, K, 1))
        scores[1] += 5
        scores[..., 7] = np.inf
        positions = np.tile(np.arange(S), (3, K, 1))
        positions[0, 1, 20:] = -1
        mean = int(draw.integers(1, 30))
        kept = budgets.adakv_global(scores, positions, mean)
        assert kept.sum() == 3 * K * mean and not kept[positions < 0].any()
        assert kept.sum(-1).min() >= max(1, int(0.2 * mean))
        assert kept[..., 7].all()
    backwards = np.arange(5)[None, None, ::-1]
    plain = budgets.adakv_global(np.zeros((1, 1, 5)), backwards, 2)
    np.testing.assert_array_equal(plain[0, 0], [False, False, False, True, True])
