"""Quantised keys or values as the kernels read them: packed codes and their scales."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.types import pytree, static

BITS = (1, 2, 4, 8)
"""Of a code: those that fill bytes."""


@final
@pytree
class Quantized:
    """`value = code * scale + zero`, `bits` per code, packed along the channels.

    Byte `j` of a slot holds channels `j, j + D/n, j + 2 D/n, ...`, lowest bits first
    (`n = 8 / bits`), so that unpacking is `n` slabs of channels and no interleave.
    `channel`: a group is `group` consecutive slots of one channel, `scale` is
    `[*lead, S / group, D]`. `token`: a group is `group` channels of one slot, `scale`
    is `[*lead, S, D / group]`. `zero` is None for symmetric codes, whose zero point
    is `(2**bits - 1) // 2`.

    Scales and zeros are float16 numbers, stored as their bits in int16: TPU kernels
    load no float16, and a TPU copies an array to read other bits in it. Elsewhere the
    two are one. Every op also takes float16 itself.
    """

    codes: Int[Array, "*lead S D_packed"]
    scale: Int[Array, "*lead A C"] | Float[Array, "*lead A C"]
    zero: Int[Array, "*lead A C"] | Float[Array, "*lead A C"] | None
    bits: int = static()
    axis: str = static()
    group: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values, `[*lead, S, D]`."""
        *lead, slots, packed = self.codes.shape
        return (*lead, slots, packed * 8 // self.bits)


def half_bits(x: Array) -> Int[Array, "..."]:
    """The bits, int16, of numbers rounded to float16."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.int16)


def numbers(x: Array) -> Float[Array, "..."]:
    """Scales or zeros as floats: float16 from their bits, floats as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.float16) if x.dtype == jnp.int16 else x


def readable(quantized: Quantized) -> Quantized:
    """The same with scales and zeros as floats, if they are given as bits."""
    return dataclasses.replace(
        quantized,
        scale=numbers(quantized.scale),
        zero=None if quantized.zero is None else numbers(quantized.zero),
    )
