"""References of ThinK and of the rotated codec: worked examples, exact properties."""

import numpy as np
import pytest

from tests.reference import think, turboquant


def test_think_example():
    q = np.array([[[9.0, 9.0], [1.0, 2.0]], [[9.0, 9.0], [3.0, 0.0]]])
    k = np.array([[[1.0, 1.0], [1.0, 3.0], [50.0, 50.0]]])
    scores = think.think_channel_scores(
        q,
        k,
        positions=np.array([[0, 1, -1]]),
        q_positions=np.array([0, 1]),
        window=1,
    )
    np.testing.assert_allclose(scores, [[5.0 * 1.0, 2.0 * 5.0]])
    kept = think.think_kept_channels(np.array([[1.0, 1.0, 1.0, 2.0]]), 0.7)
    np.testing.assert_array_equal(kept, [[True, False, False, True]])
    np.testing.assert_array_equal(think.think_keys(np.ones((1, 1, 4)), kept)[0], kept)


def test_levels_are_the_means_of_their_cells():
    for width, bits in ((4, 2), (16, 3), (128, 4), (256, 1)):
        levels = turboquant.lloyd_max_levels(width, bits)
        np.testing.assert_array_equal(levels, -levels[::-1])
        t = np.linspace(-1, 1, 400_001)
        density = (1 - t * t) ** ((width - 3) / 2)
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, t)
        mass = np.bincount(cell, density)
        means = np.bincount(cell, density * t) / mass
        np.testing.assert_allclose(means, levels, atol=2e-5)
    # Towards many dimensions: the levels of a normal variable (Max, 1960).
    normal = turboquant.lloyd_max_levels(1024, 2) * 32
    np.testing.assert_allclose(normal[2:], [0.4528, 1.510], atol=2e-3)


@pytest.mark.parametrize("bits, error", [(4, 0.0093), (3, 0.0340), (2, 0.1160)])
def test_rotated_codec(draw, bits, error):
    width = 128
    signs = draw.choice([-1.0, 1.0], width)
    x = draw.normal(size=(300, width)) * draw.gamma(1, size=(300, 1))
    x[:, 3] *= 30  # an outlier channel, which the rotation spreads
    x[7] = 0
    turned = turboquant.rotate_in(x, signs)
    np.testing.assert_allclose(turboquant.rotate_out(turned, signs), x, atol=1e-12)
    codes, norms = turboquant.encode(x, signs, bits=bits)
    assert codes.min() >= 0 and codes.max() < 2**bits
    back = turboquant.decode(codes, norms, signs, bits=bits)
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), norms)
    assert not back[7].any()
    moved = ((back - x) ** 2).sum(1)[norms > 0] / norms[norms > 0] ** 2
    assert 0.7 * error < moved.mean() < 1.5 * error
    packed = turboquant.pack(codes[0], bits)
    assert packed.nbytes * 8 + 16 == turboquant.bits_per_vector(width, bits)
    np.testing.assert_array_equal(turboquant.unpack(packed, bits), codes[0])


def test_hadamard_is_its_own_inverse():
    matrix = turboquant.hadamard(8)
    np.testing.assert_allclose(matrix @ matrix, np.eye(8), atol=1e-15)
    np.testing.assert_array_equal(
        np.sign(turboquant.hadamard(4)),
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]],
    )
