"""float16 rounding in 32-bit arithmetic, for kernels on chips without float16."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.quantize_pack.reference import LARGEST, SMALLEST, ULP

_NORMAL = 2.0**-14
"""The smallest normal float16 number."""


def half(x: Array) -> tuple[Array, Array]:
    """The nearest finite float16 number, ties to even: its value in f32, its bits.

    Normal numbers round in the integer domain, where 13 bits of the mantissa go.
    Subnormal ones are multiples of 2^-24, the spacing of float32 just above 0.5.
    """
    x = jnp.clip(x, -LARGEST, LARGEST)
    size = jnp.abs(x)
    word = jax.lax.bitcast_convert_type(size, jnp.int32)
    odd = jnp.right_shift(word, 13) & 1
    rounded = (word + 0xFFF + odd) & ~0x1FFF
    steps = jax.lax.bitcast_convert_type(size + 0.5, jnp.int32) - 0x3F000000
    small = size < _NORMAL
    # From the integers: compilers turn (size + 0.5) - 0.5 back into size.
    value = jnp.where(
        small,
        steps.astype(jnp.float32) * SMALLEST,
        jax.lax.bitcast_convert_type(rounded, jnp.float32),
    )
    bits = jnp.where(small, steps, jnp.right_shift(rounded, 13) - (112 << 10))
    negative = x < 0
    return jnp.where(negative, -value, value), jnp.where(negative, bits | 0x8000, bits)


def not_above(low: Array) -> tuple[Array, Array]:
    """`reference.not_above` with the bits of the result."""
    first, first_bits = half(low - jnp.abs(low) * ULP)
    second, second_bits = half(first - SMALLEST)
    above = first > low
    return jnp.where(above, second, first), jnp.where(above, second_bits, first_bits)


def outwards(scale: Array) -> tuple[Array, Array]:
    """`reference.outwards` with the bits of the result."""
    first, first_bits = half(scale * (1 + ULP))
    second, second_bits = half(first + SMALLEST)
    below = first < scale
    value = jnp.where(below, second, first)
    bits = jnp.where(below, second_bits, first_bits)
    some = value > 0
    return jnp.where(some, value, 1.0), jnp.where(some, bits, 0x3C00)
