"""Keys or values in a TPU kernel: their blocks, and products with codes as they are.

With `value = code * scale + zero` a product with a stored matrix is a product with
its codes, whose operand or result is scaled. Where scales differ between `n` groups,
`n` copies of the small operand, one per group, go through one product (rows are free
on the MXU: it is loaded with codes either way), and each group keeps its own part:

    keys, channel   (q * scale[i]) . codes     of which the slots of group i
    keys, token     sum_i scale[i] * ((q, channels of group i) . codes)
    values, channel sum_i scale[i] * ((p, slots of group i) . codes)
    values, token   (p * scale[i]) . codes     of which the channels of group i
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kvjax.pallas_kernels.quantized import Quantized

LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """How keys or values lie in memory; static.

    Attributes:
        block: slots per block.
        width: channels, `D`.
        packed: last axis of what is stored, `D` or bytes.
        bits: per code; None for plain arrays.
        axis: of the groups, see `Quantized`.
        group: of the groups.
        symmetric: there are no zeros.
        dtype: of the operands of the products.
        turned: XLA makes a copy of scales and zeros before the kernel starts.
    """

    block: int
    width: int
    packed: int
    bits: int | None = None
    axis: str = ""
    group: int = 0
    symmetric: bool = True
    dtype: Any = jnp.bfloat16
    turned: bool = False

    @classmethod
    def of(cls, name: str, side: Any, block: int, q_dtype: Any) -> Self:
        """The description of `side`.

        Raises:
            NotImplementedError: no blocks or lanes of its groups, or codes of 1 bit.
        """
        if not isinstance(side, Quantized):
            dtype = jnp.promote_types(q_dtype, side.dtype)
            d = side.shape[-1]
            return cls(block=block, width=d, packed=d, dtype=dtype)
        if side.bits == 1:
            why = f"`{name}` has 1-bit codes, which have no TPU kernel."
            raise NotImplementedError(f"decode_attention: {why}")
        chunk = min(block, LANES)
        if side.axis == "channel" and (
            block % side.group or (chunk % side.group and side.group % chunk)
        ):
            raise NotImplementedError(
                f"decode_attention: `{name}` has groups of {side.group} slots, which "
                f"do not fit blocks of {block} slots in chunks of {chunk}."
            )
        return cls(
            block=block,
            width=side.shape[-1],
            packed=side.codes.shape[-1],
            bits=side.bits,
            axis=side.axis,
            group=side.group,
            symmetric=side.zero is None,
            dtype=jnp.dtype(q_dtype),
            # One scale per slot lies with the heads along the sublanes, and int16 bits
            # in float16 are read by a copy.
            turned=side.scale.shape[-1] == 1 or side.scale.dtype == jnp.float16,
        )

    @property
    def columns(self) -> bool:
        """Whether blocks are `[packed, block]`, slots along the lanes."""
        return self.packed % LANES != 0

    @property
    def operands(self) -> int:
        """Arrays per block: codes, scale, zero."""
        return 1 if self.bits is None else 2 + (not self.symmetric)

    @property
    def groups(self) -> int:
        """Groups that one product meets: of channels, or of slots per chunk."""
        if self.axis == "token":
            return self.width // self.group
        return self.chunk // self.group

    @property
    def chunk(self) -> int:
        """Slots per product."""
        if self.axis != "channel":
            return self.block
        return max(min(self.block, LANES), self.group)

    def arrays(self, side: Any, lift: Any, own: Any = None) -> list[Any]:
        """What the kernel reads, four axes each.

        Args:
            side: keys or values.
            lift: adds the head axis.
            own: takes the rows that the queries read, of what is copied anyway; None
                where they are all.
        """
        if self.bits is None:
            return [self._turn(lift(side))]
        sides = [side.scale] + ([] if self.symmetric else [side.zero])
        if self.turned and own is not None:
            sides = own(sides)
        # Mosaic TPU takes no float16, and XLA copies where it reads other bits in them:
        # caches that keep the bits (int16) do without.
        sides = [
            jax.lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.float16 else x
            for x in sides
        ]
        if self.axis == "token":
            sides = [jnp.swapaxes(x, -1, -2) for x in sides]
        return [self._turn(lift(side.codes)), *(lift(x) for x in sides)]

    def _turn(self, x: Any) -> Any:
        return jnp.swapaxes(x, -1, -2) if self.columns else x

    def specs(self, at: Any, own: Any = None) -> list[pl.BlockSpec]:
        """Blocks of `arrays`; `at` maps the grid to (row, head, block), as does `own`.

        `own` counts the rows of the queries, `at` those that are stored; None where
        they are the same.
        """

        def spec(at: Any, count: int, wide: int, columns: bool) -> pl.BlockSpec:
            def rows(*grid):
                i, k, j = at(*grid)
                return i, k, j, 0

            def lanes(*grid):
                i, k, j = at(*grid)
                return i, k, 0, j

            # Whole blocks: a reference with squeezed axes has no `bitcast`.
            if columns:
                return pl.BlockSpec((1, 1, wide, count), lanes)
            return pl.BlockSpec((1, 1, count, wide), rows)

        out = [spec(at, self.block, self.packed, self.columns)]
        here = own if self.turned and own is not None else at
        for _ in range(self.operands - 1):
            if self.axis == "token":
                out.append(spec(here, self.block, self.width // self.group, True))
            else:
                out.append(spec(here, self.block // self.group, self.width, False))
        return out

    def scores(self, q, refs):
        """`q [R, D]` times a block of keys: `[R, block]` float32."""
        wide = self._codes(refs[0])
        if self.bits is None:
            return self._inner(q, wide)
        scale, zero = self._scales(refs)
        q = q.astype(jnp.float32)
        if self.axis == "token":
            channel = jax.lax.broadcasted_iota(jnp.int32, (1, self.width), 1)
            parts = [
                jnp.where(channel // self.group == i, q, 0.0)
                for i in range(self.groups)
            ]
            found = self._inner(_stack(parts), wide)
            return sum(
                _row(found, i, len(q)) * scale[i : i + 1]
                + jnp.sum(part, axis=1, keepdims=True) * zero[i : i + 1]
                for i, part in enumerate(parts)
            )
        return jnp.concatenate(
            [self._scores_chunk(q, *c) for c in self._chunks(wide, scale, zero)], 1
        )

    def _scores_chunk(self, q, wide, scale, zero):
        n = self.groups
        found = self._inner(_stack([q * scale[i : i + 1] for i in range(n)]), wide)
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, self.chunk), 1)
        out = found[: len(q)]
        for i in range(n):
            shift = jnp.sum(q * zero[i : i + 1], axis=1, keepdims=True)
            part = _row(found, i, len(q)) + shift
            out = jnp.where(slot // self.group == i, part, out) if i else part
        return out

    def mix(self, weight, live, refs):
        """`weight [R, block]` times a block of values: `[R, D]` float32.

        `live [1, block]` are the slots that some query sees; the others may hold
        anything, and their weight is 0.
        """
        wide = self._codes(refs[0])
        if self.bits is None:
            if not self.columns:
                live = jnp.swapaxes(
                    jnp.broadcast_to(live.astype(jnp.float32), (8, self.block)), 0, 1
                )[:, :1]
                live = live > 0
            return self._outer(weight, jnp.where(live, wide, jnp.zeros_like(wide)))
        scale, zero = self._scales(refs)
        if self.axis == "token":
            scale, zero = jnp.where(live, scale, 0.0), jnp.where(live, zero, 0.0)
            found = self._outer(
                _stack([weight * scale[i : i + 1] for i in range(self.groups)]), wide
            )
            channel = jax.lax.broadcasted_iota(jnp.int32, (1, self.width), 1)
            out = found[: len(weight)]
            for i in range(self.groups):
                shift = jnp.sum(weight * zero[i : i + 1], axis=1, keepdims=True)
                part = _row(found, i, len(weight)) + shift
                same = channel // self.group == i
                out = jnp.where(same, part, out) if i else part
            return out
        parts = self._chunks(wide, scale, zero)
        return sum(
            self._mix_chunk(weight[:, at * self.chunk : (at + 1) * self.chunk], *c)
            for at, c in enumerate(parts)
        )

    def _mix_chunk(self, weight, wide, scale, zero):
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, self.chunk), 1)
        parts = [
            jnp.where(slot // self.group == i, weight, 0.0) for i in range(self.groups)
        ]
        found = self._outer(_stack(parts), wide)
        out = 0.0
        for i, part in enumerate(parts):
            total = jnp.sum(part, axis=1, keepdims=True)
            one = _row(found, i, len(weight)) * scale[i : i + 1]
            # A group of free slots may have any scale, and 0 * NaN is NaN.
            out = out + jnp.where(total > 0, one + total * zero[i : i + 1], 0.0)
        return out

    def _codes(self, ref):
        """The block as operands of a product, codes unpacked along the channels."""
        x = ref[0, 0]
        if self.bits is None:
            return x.astype(self.dtype)
        x = x.astype(jnp.int32)
        if self.bits < 8:
            low = 2**self.bits - 1
            slabs = [(x >> shift) & low for shift in range(0, 8, self.bits)]
            x = jnp.concatenate(slabs, axis=0 if self.columns else 1)
        return x.astype(jnp.float32).astype(self.dtype)

    def _scales(self, refs):
        scale = widened(refs[1])
        if self.symmetric:
            assert self.bits is not None
            return scale, -((2**self.bits - 1) // 2) * scale
        return scale, widened(refs[2])

    def _chunks(self, wide, scale, zero):
        """Codes, scales and zeros of each chunk of slots."""
        for at in range(self.block // self.chunk):
            slots = slice(at * self.chunk, (at + 1) * self.chunk)
            rows = slice(at * self.groups, (at + 1) * self.groups)
            codes = wide[:, slots] if self.columns else wide[slots]
            yield codes, scale[rows], zero[rows]

    def _inner(self, x, wide):
        """`x [X, D]` times slots, over the channels."""
        return self._dot(x, wide, 0 if self.columns else 1)

    def _outer(self, x, wide):
        """`x [X, slots]` times channels, over the slots."""
        return self._dot(x, wide, 1 if self.columns else 0)

    def _dot(self, x, wide, axis):
        exact = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        return jax.lax.dot_general(
            x.astype(self.dtype),
            wide,
            (((1,), (axis,)), ((), ())),
            precision=exact,
            preferred_element_type=jnp.float32,
        )


def widened(ref):
    """Scales or zeros in float32; int16 stands for the bits of a float16.

    TPUs flush subnormal numbers, so those of float16 are built from their mantissa.
    """
    x = ref[0, 0]
    if x.dtype != jnp.int16:
        return x.astype(jnp.float32)
    x = x.astype(jnp.int32)
    magnitude = x & 0x7FFF
    normal = jax.lax.bitcast_convert_type(magnitude << 13, jnp.float32) * 2.0**112
    small = magnitude.astype(jnp.float32) * 2.0**-24
    value = jnp.where(magnitude < 1 << 10, small, normal)
    return jnp.where(x < 0, -value, value)


def _stack(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _row(x, index, rows):
    return x[index * rows : (index + 1) * rows]
