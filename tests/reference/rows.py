"""Sizes of a drawn row, and its tokens in other slots."""

import numpy as np

H, K, S, D, FREE = 4, 2, 40, 8, 5
FREQUENCIES = 10_000.0 ** -(np.arange(0, D, 2) / D)


def scattered(draw, positions, *arrays):
    """The same tokens in other slots, other ones in each head, with free slots."""
    slots = [draw.permutation(S + FREE)[:S] for _ in range(K)]
    moved = [np.full((K, S + FREE), -1)]
    moved += [draw.normal(size=(K, S + FREE, *x.shape[2:])) for x in arrays]
    for new, old in zip(moved, (positions, *arrays), strict=True):
        for n in range(K):
            new[n, slots[n]] = old[n]
    return slots, *moved
