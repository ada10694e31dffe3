"""Keys or values in the memory of the host: what is read of them is fetched."""

from typing import final

from kvjax.codecs.base import AbstractEncoded
from kvjax.memory import to_device, to_host
from kvjax.types import pytree


@final
@pytree
class OnHost(AbstractEncoded):
    """An encoded array that lies in the host's memory.

    A block, or the pages that a query reads, come to the device when they are wanted,
    and no more of it. Inside `jit` that is part of the types (`kvjax.memory`).
    """

    of: AbstractEncoded

    @classmethod
    def moved(cls, of: AbstractEncoded) -> "OnHost":
        """`of` in the host's memory."""
        return cls(of=to_host(of))

    @property
    def fetched(self) -> AbstractEncoded:
        """All of it on the device."""
        return to_device(self.of)

    @property
    def slots(self):
        return self.of.slots

    def decode(self, positions, rope):
        return self.fetched.decode(positions, rope)

    @property
    def settles(self):
        return self.of.settles

    def settled(self):
        return OnHost.moved(self.fetched.settled())

    def block(self, start, size, turn=None):
        return to_device(self.of.block(start, size, turn))

    def pages(self, index, page, turn=None):
        return to_device(self.of.pages(index, page, turn))

    @property
    def block_multiple(self):
        return self.of.block_multiple

    def put(self, block, start, rows, turn=None):
        return OnHost(of=self.of.put(block, start, rows, turn))
