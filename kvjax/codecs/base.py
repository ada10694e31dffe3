"""Contract of codecs: how the keys or the values of a part are held."""

import abc
import dataclasses
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvjax.fields import Checked
from kvjax.memory import beside, to_device
from kvjax.pallas_kernels.quantized import Quantized
from kvjax.rope import Rope
from kvjax.turns import FEW, Turn, each
from kvjax.types import Held, LayerInputs

Side = Literal["keys", "values"]
"""What a codec holds."""


class AbstractEncoded(abc.ABC):
    """An encoded array: codes plus the side state that decodes them. A pytree.

    Logical shape `[*lead, S, D]`: slots by channels. Leading axes are `B K` in a
    `Slots` part and `B` in a `Ragged` one. The first field holds the numbers or their
    codes, or what does; the others are the side state that decodes them.
    """

    @property
    @abc.abstractmethod
    def slots(self) -> int:
        """Logical slots `S` (capacity)."""

    @abc.abstractmethod
    def decode(
        self, positions: Int[Array, "*lead S"], rope: Rope
    ) -> Float[Array, "*lead S D"]:
        """The array it stands for, keys rotated to `positions`."""

    @property
    def stored(self) -> Array | Quantized | None:
        """The same as kernels read it; None if they cannot: then it is decoded."""
        return None

    def settled(self) -> Self:
        """The same in arrays cut to what the data need; not for use under `jit`.

        With arrays of several layers, to what any of them needs.
        """
        return self

    @property
    def settles(self) -> bool:
        """Whether `settled` may be smaller, by data."""
        return type(self).settled is not AbstractEncoded.settled

    @property
    def apart(self) -> tuple[Any, Any]:
        """The numbers or their codes, and the side state, as trees of arrays."""
        first, *others = (
            getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if not field.metadata.get("static")
        )
        if isinstance(first, AbstractEncoded):
            codes, side = first.apart
            return codes, (side, others)
        return first, others

    @abc.abstractmethod
    def block(self, start: Any, size: int, turn: Turn = None) -> "AbstractEncoded":
        """Slots `start .. start + size` (`size` static), decodable by themselves.

        With a `turn` those of one layer, where the arrays are those of several.
        """

    def pages(
        self, index: Int[Array, "B K C"], page: int, turn: Turn = None
    ) -> "AbstractEncoded":
        """Pages of `page` slots of each head, one behind the other, `[B, K, C * page]`.

        Every leaf has its slots, or its groups of slots, on the second last axis.
        """
        slots = self.slots
        return jax.tree.map(lambda x: picked(x, index, page, slots, turn), self)

    @property
    def block_multiple(self) -> int:
        """`start` and `size` of `block` must be multiples of this."""
        return 1

    def put(
        self,
        block: Self,
        start: Int[Array, "B"],
        rows: Bool[Array, "B"],
        turn: Turn = None,
    ) -> Self:
        """Overwrite slots from `start` on with an encoded block, in the given rows.

        Every leaf has its slots, or its groups of slots, on the second last axis.
        Codes outside the block stay bit for bit what they were.
        """

        def write(old: Array, new: Array) -> Array:
            return put_block(
                old, new, start // (self.slots // old.shape[-2]), rows, turn
            )

        return jax.tree.map(write, self, block)


def picked(
    x: Shaped[Array, "*layers B K X C"],
    index: Int[Array, "B K N"],
    page: int,
    slots: int,
    turn: Turn = None,
) -> Array:
    """Of `slots` slots of each head some pages, one behind the other."""
    b, kv_heads, _ = index.shape
    rows = x.shape[-2] * page // slots  # slots of a page, or their groups
    row = jnp.arange(b) if turn is None else turn * b + jnp.arange(b)
    first = (row[:, None] * kv_heads + jnp.arange(kv_heads)) * (slots // page)
    line = x.reshape(-1, rows, x.shape[-1])
    at = beside(first[..., None] + index, x)
    return line[at].reshape(b, kv_heads, -1, x.shape[-1])


def put_block(
    old: Array,
    new: Array,
    start: Int[Array, "B"],
    rows: Bool[Array, "B"],
    turn: Turn = None,
) -> Array:
    """`old` with `new [B, ..., R, C]` at `start` of its second last axis, by row."""
    lead = () if turn is None else (turn,)
    zeros = (jnp.int32(0),) * (new.ndim - 3)
    shape = (1,) * len(lead) + (1, *new.shape[1:])

    def begin(row: Any) -> tuple[Any, ...]:
        return (*lead, row, *zeros, start[row], jnp.int32(0))

    def piece(row: Any, held: Array) -> Array:
        there = to_device(jax.lax.dynamic_slice(held, begin(row), shape))
        mine = jax.lax.dynamic_slice_in_dim(new, row, 1).astype(held.dtype)
        return beside(jnp.where(rows[row], mine.reshape(shape), there), held)

    count = new.shape[0]
    if count == 1 or count > FEW:

        def one(row: Array, held: Array) -> Array:
            return jax.lax.dynamic_update_slice(held, piece(row, held), begin(row))

        return each(count, one, old)
    # All is read before anything is written, or every write would copy the whole.
    pieces = [piece(row, old) for row in range(count)]
    pieces, old = jax.lax.optimization_barrier((pieces, old))
    for row in range(count):
        old = jax.lax.dynamic_update_slice(old, pieces[row], begin(row))
    return old


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractCodec(Checked, abc.ABC):
    """Turns a plain array into an encoded one, once; holds hyper-parameters only."""

    needs_basis: ClassVar[bool] = False
    """Whether the model must have a `Projection` of these keys or values."""

    differentiable: ClassVar[bool] = False
    """Whether gradients go through what is decoded; if not, straight past it."""

    plain: ClassVar[bool] = False
    """Whether arrays are held as they are."""

    flat: ClassVar[bool] = True
    """Whether slots of any heads can lie in one buffer; if not, `x` is `[B K S D]`."""

    coded: ClassVar[bool] = False
    """Whether there are codes, of some bits (`with_bits`)."""

    def observe(self, asked: LayerInputs, held: Held, of: Side) -> Any:
        """What is known of the whole prompt before any of it is encoded.

        Args:
            asked: the prompt's queries, and what the model says of its tokens.
            held: its keys and values.
            of: what is to be encoded.

        Returns:
            A pytree, handed to `encode`; None if there is nothing to know.
        """
        del asked, held, of

    @abc.abstractmethod
    def encode(
        self,
        x: Float[Array, "*lead S D"],
        live: Bool[Array, "*lead S"],
        positions: Int[Array, "*lead S"],
        rope: Rope,
        side: Any = None,
    ) -> AbstractEncoded:
        """Encode; slots that are not `live` are never read and may hold NaN.

        Args:
            x: keys after RoPE, or values.
            live: which slots count.
            positions: absolute positions, for codecs that undo the rotation.
            rope: the layer's rotary embedding.
            side: what `observe` returned.
        """

    @abc.abstractmethod
    def slot_bytes(self, head_dim: int, itemsize: int) -> float:
        """Bytes per slot and head, side state that grows with the slots included."""

    @property
    def observes(self) -> bool:
        """Whether it looks at a prompt before any of it is encoded (`observe`)."""
        return type(self).observe is not AbstractCodec.observe

    @property
    def appendable(self) -> bool:
        """Whether blocks of later tokens can be encoded by themselves."""
        return False

    @property
    def append_multiple(self) -> int:
        """Tokens in an appended block must be a multiple of this."""
        return 1

    @property
    def kept(self) -> float | None:
        """Fraction of the numbers of a slot that is held, if that is a budget."""
        return None

    def with_keep(self, keep: float) -> Self:
        """The same codec at another fraction of the numbers of a slot."""
        raise AssertionError(f"{type(self).__name__} holds all numbers; got {keep}")

    def with_bits(self, bits: int) -> Self:
        """The same codec with codes of `bits` bits.

        Raises:
            ValueError: it does not know so many.
        """
        raise AssertionError(f"{type(self).__name__} has no codes; got {bits}")

    def validate(self, head_dim: int) -> None:
        """Raise `ValueError` if this codec cannot hold heads of `head_dim`."""
        del head_dim


def straight_through(exact: Array, rounded: Array) -> Array:
    """Value of `rounded`, gradient of `exact`."""
    return exact + jax.lax.stop_gradient(rounded - exact)
