"""Which records gave no row: how many, why, and where the first of each stands."""

import collections


class LeftOut:
    """Records that were left out.

    Attributes:
        counts: how many, by reason.
        first: of each reason, the place of the first record and what was said of it.
    """

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, where: str = "", count: int = 1) -> None:
        """`count` more of a reason; `where` is the first of them."""
        if count:
            self.counts[reason] += count
            if where:
                self.first.setdefault(reason, where)

    def report(self, of: int | None) -> str:
        """All of it in a line; `of` how many records, None: that is not known."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            where = f" (first: {self.first[reason]})" if reason in self.first else ""
            parts.append(f"{count} {reason}{where}")
        records = "so far" if of is None else f"of {of}"
        return f"{self.counts.total()} records {records} left out: {', '.join(parts)}"

    def nothing(self, name: str, of: int) -> ValueError:
        """That no record of `name` is left."""
        why = f": {self.report(of)}." if self.counts else "."
        return ValueError(f"{name} has no record that can be used, of {of}{why}")


def longer(width: int) -> str:
    """The reason of what is not cut."""
    return f"longer than a row of {width} tokens"


def placed(where: str, why: str) -> str:
    """A place and what is said of it; either may be empty."""
    return ": ".join(filter(None, (where, why)))
