"""Grouped affine quantisation with bit packing (KIVI's quantiser, and int8)."""

import dataclasses
from typing import Annotated, ClassVar, final

from jaxtyping import Array, Int

from kvjax.codecs.base import AbstractCodec, AbstractEncoded
from kvjax.fields import OneOf, Size
from kvjax.pallas_kernels.quantize_pack import dequantize, quantize_pack
from kvjax.pallas_kernels.quantized import BITS, Quantized
from kvjax.turns import cut
from kvjax.types import pytree, static

AXES = ("channel", "token")


@final
@pytree
class AffineArray(AbstractEncoded):
    """Packed codes with one scale (and zero) per group.

    `channel`: a group is `group` consecutive slots of one channel, so `scale` is
    `[*lead, S / group, D]`. `token`: a group is `group` channels of one slot, so
    `scale` is `[*lead, S, D / group]`. `zero` is None for symmetric codes. Both are
    the int16 bits of float16 numbers, see `Quantized`.
    """

    codes: Int[Array, "*lead S D_packed"]
    scale: Int[Array, "*lead A C"]
    zero: Int[Array, "*lead A C"] | None
    bits: int = static()
    axis: str = static()
    group: int = static()
    dtype: str = static()

    @property
    def slots(self):
        return self.codes.shape[-2]

    @property
    def block_multiple(self):
        return self.group if self.axis == "channel" else 1

    def decode(self, positions, rope):
        del positions, rope
        return dequantize(self.stored, self.dtype)

    @property
    def stored(self) -> Quantized:
        return Quantized(
            codes=self.codes,
            scale=self.scale,
            zero=self.zero,
            bits=self.bits,
            axis=self.axis,
            group=self.group,
        )

    def block(self, start, size, turn=None):
        each = self.block_multiple

        def units(x: Array, unit: int) -> Array:
            return cut(x, start // unit, size // unit, -2, turn)

        return dataclasses.replace(
            self,
            codes=units(self.codes, 1),
            scale=units(self.scale, each),
            zero=None if self.zero is None else units(self.zero, each),
        )


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(AbstractCodec):
    """`x ~ code * scale + zero` with `bits` per element, scales in float16.

    Attributes:
        bits: 1, 2, 4 or 8; codes are packed into bytes along the channels.
        axis: `channel` groups consecutive slots of a channel (right for keys, whose
            outliers live in channels), `token` groups channels of a slot (values).
        group: elements per group; along channels it is cut to `D`. None is the
            whole slot (`token` only).
        symmetric: no zero point; codes are signed around 0; not with 1 bit.

    Cost: `D * bits / 8` bytes per slot and head, plus 4 (symmetric: 2) per group.

    Source: KIVI (2402.02750) section 3; asymmetric min/scale, round to nearest.
    Deviations: scale and zero are rounded outwards to float16, so that every value
    stays within half a step; a trailing partial group uses its live slots only. KIVI
    stops at 2 bits: with 1 the two levels are the means of the values below and above
    the middle of a group's range, since its ends are off by more than the values
    spread.
    """

    bits: Annotated[int, OneOf(*BITS)] = 4
    axis: Annotated[str, OneOf(*AXES)] = "token"
    group: Size | None = 32
    symmetric: bool = False
    coded: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.symmetric and self.bits == 1:
            raise ValueError(
                "`symmetric` needs a bit for the sign; got bits=1. Use "
                "symmetric=false, or more bits."
            )
        if self.group is None and self.axis == "channel":
            raise ValueError(
                "`group` is needed with axis='channel': the slots that share a scale."
            )

    def _group(self, head_dim: int) -> int:
        if self.axis == "token":
            return min(self.group or head_dim, head_dim)
        assert self.group is not None
        return self.group

    def encode(self, x, live, positions, rope, side=None):
        del positions, rope, side
        group = self._group(x.shape[-1])
        if self.axis == "channel" and x.shape[-2] % group:
            raise ValueError(
                f"per-channel groups need a multiple of {group} slots; got "
                f"{x.shape[-2]}. Pad with free slots."
            )
        stored = quantize_pack(
            x,
            live,
            bits=self.bits,
            axis=self.axis,
            group=group,
            symmetric=self.symmetric,
        )
        return AffineArray(
            codes=stored.codes,
            scale=stored.scale,
            zero=stored.zero,
            bits=self.bits,
            axis=self.axis,
            group=group,
            dtype=str(x.dtype),
        )

    def with_bits(self, bits):
        return dataclasses.replace(self, bits=bits)

    def slot_bytes(self, head_dim, itemsize):
        del itemsize
        group = self._group(head_dim)
        return (
            head_dim * self.bits / 8 + (2 if self.symmetric else 4) * head_dim / group
        )

    @property
    def appendable(self):
        return True

    @property
    def append_multiple(self):
        return self._group(1) if self.axis == "channel" else 1

    def validate(self, head_dim):
        per_byte = 8 // self.bits
        if head_dim % per_byte:
            raise ValueError(
                f"{self.bits}-bit codes pack {per_byte} channels into a byte; got "
                f"head_dim={head_dim}. Use more bits."
            )
        if self.axis == "token" and head_dim % self._group(head_dim):
            raise ValueError(
                f"`group`={self.group} must divide head_dim={head_dim} with "
                "axis='token'."
            )
