"""Exact shares of counts, in int32, the same on the host and on a device.

Every function takes counts of `0 .. LONGEST`, traced or not: JAX arrays give JAX
arrays, NumPy arrays and integers give those, and then nothing is compiled.
"""

import functools
from fractions import Fraction
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LONGEST = 2**27
"""The largest count, of tokens say, that the sums of this module have room for."""

BITS = 3
"""Bits of a digit: `LONGEST` times the largest, and a carry, must fit in 31."""


def namespace(*arrays: Any) -> ModuleType:
    """`jax.numpy` if one of `arrays` is JAX's, traced or not; otherwise `numpy`."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def decimal(x: float | int) -> Fraction:
    """The shortest decimal that `x` prints as: 7/100 for 0.07."""
    return Fraction(repr(float(x)))


def ceil_share(n: Any, keep: float | int) -> Any:
    """`keep` of `n`, rounded up; `keep=1` is all of it.

    `keep` is taken as the shortest decimal it prints as, so that 0.07 of 1000 tokens
    are 70 and not 71.

    Args:
        n: counts of `0 .. LONGEST`.
        keep: a fraction in `[0, 1]`.
    """
    share = decimal(keep)
    return floor_share(n, share, 1 - Fraction(1, share.denominator))


def floor_share(n: Any, share: Fraction, more: Fraction = Fraction(0)) -> Any:
    """`floor(n * share + more)`.

    Args:
        n: counts of `0 .. LONGEST`.
        share: a fraction in `[0, 1]`.
        more: a fraction in `[0, 1)`; 1/2 rounds to the nearest.
    """
    (whole, digits), carries = _digits((share,), more)
    columns = [
        (int(digit[0]), carry) for digit, carry in zip(digits, carries, strict=True)
    ]
    return _sum(n, int(whole[0]), columns)


def floor_shares(
    n: Any, shares: tuple[Fraction, ...], more: Fraction = Fraction(0)
) -> Any:
    """`floor_share` for each of `shares`: `[L, *n.shape]`."""
    (whole, digits), carries = _digits(shares, more)
    shape = (len(shares),) + (1,) * np.ndim(n)
    columns = [
        (digit.reshape(shape), carry)
        for digit, carry in zip(digits, carries, strict=True)
    ]
    return _sum(n, whole.reshape(shape), columns)


def _sum(n: Any, whole: Any, columns: list[tuple[Any, int]]) -> Any:
    """Long multiplication, from the least digit; carries are at most `n + 1`."""
    carry: Any = 0
    for digit, more in columns:
        carry = (n * digit + (carry + more)) >> BITS
    return n * whole + carry


@functools.lru_cache(maxsize=1024)
def _digits(shares: tuple[Fraction, ...], more: Fraction):
    """Whole parts `[L]`, digits `[D, L]` behind the point and those of `more`.

    The digits are of numbers a little above, by less than `2**-bits` each. With
    `2**bits > denominator * (LONGEST + 1)` that moves `n * share + more` by less than
    its distance to the next integer above, so that its floor is exact.
    """
    assert all(0 <= share <= 1 for share in shares) and 0 <= more < 1
    largest = max(share.denominator for share in shares) * more.denominator
    length = -(-(largest * (LONGEST + 1)).bit_length() // BITS)
    unit = 2 ** (BITS * length)
    ups = [-(-share.numerator * unit // share.denominator) for share in shares]
    up = -(-more.numerator * unit // more.denominator)
    places = [BITS * place for place in range(length)]
    mask = 2**BITS - 1
    digits = [np.array([x >> place & mask for x in ups], np.int32) for place in places]
    whole = np.array([x >> BITS * length for x in ups], np.int32)
    return (whole, digits), [up >> place & mask for place in places]


def floor_product(n: Any, times: Any, over: Any, most: int) -> Any:
    """`floor(n * times / over)`, without the product.

    Args:
        n: counts of `0 .. over`.
        times: counts of `0 .. most`.
        over: counts of `1 .. LONGEST`.
        most: the largest `times`; one division for each of its bits.
    """
    quotient: Any = 0
    rest: Any = 0
    for bit in reversed(range(most.bit_length())):
        rest = 2 * rest + (times >> bit & 1) * n
        quotient = 2 * quotient + rest // over
        rest = rest % over
    return quotient
