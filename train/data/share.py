"""Which rows of a batch a process makes, where several train one model."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShare:
    """The rows of a batch that one process makes: parts `first .. last - 1` of `ways`.

    Where several processes hold the same rows, each makes them.
    """

    first: int = 0
    last: int = 1
    ways: int = 1

    def rows(self, count: int) -> range:
        """Of a batch of `count`."""
        return range(count * self.first // self.ways, count * self.last // self.ways)

    def of(self, rows: int) -> int:
        """Rows of the batch of which this share has `rows`."""
        return rows * self.ways // (self.last - self.first)


WHOLE = RowShare()
