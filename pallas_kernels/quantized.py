"""Quantised keys or values as the kernels read them: packed codes and their scales."""

from typing import final

from jaxtyping import Array, Float, Int

from kvjax.types import pytree, static


@final
@pytree
class Quantized:
    """`value = code * scale + zero`, `bits` per code, packed along the channels.

    Byte `j` of a slot holds channels `j, j + D/n, j + 2 D/n, ...`, lowest bits first
    (`n = 8 / bits`), so that unpacking is `n` slabs of channels and no interleave.
    `channel`: a group is `group` consecutive slots of one channel, `scale` is
    `[*lead, S / group, D]`. `token`: a group is `group` channels of one slot, `scale`
    is `[*lead, S, D / group]`. `zero` is None for symmetric codes, whose zero point
    is `(2**bits - 1) // 2`. Scales and zeros are float16.
    """

    codes: Int[Array, "*lead S D_packed"]
    scale: Float[Array, "*lead A C"]
    zero: Float[Array, "*lead A C"] | None
    bits: int = static()
    axis: str = static()
    group: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values, `[*lead, S, D]`."""
        *lead, slots, packed = self.codes.shape
        return (*lead, slots, packed * 8 // self.bits)
