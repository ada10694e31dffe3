"""What a run of the harness read and held: what results say besides their scores."""

import dataclasses
import logging
from typing import Any

LOG = logging.getLogger("kvjax.eval")


@dataclasses.dataclass
class Tally:
    """Sums over all requests so far.

    Attributes:
        requests: answered requests.
        contexts: prefilled contexts; several requests may share one.
        resident: bytes of their caches, as they were when compressed.
        full: bytes of the same caches, uncompressed.
        truncated: requests whose context was cut at the left.
        single: requests whose context is one token: nothing can be compressed.
        rolled: tokens scored by `loglikelihood_rolling`.
        plain: those of them that had nothing compressed in front.
    """

    requests: int = 0
    contexts: int = 0
    resident: float = 0.0
    full: float = 0.0
    truncated: int = 0
    single: int = 0
    rolled: int = 0
    plain: int = 0

    def cut(self, tokens: int, most: int) -> None:
        """A context of `tokens` tokens did not fit; said once."""
        if not self.truncated:
            LOG.warning(
                "a context of %d tokens is cut at its left, for %d fit before what "
                "follows. Others may be, too; `truncated_requests` counts them.",
                tokens,
                most,
            )
        self.truncated += 1

    def held(self, rows: int, resident: float, full: float) -> None:
        """Contexts were read; bytes of one."""
        self.contexts += rows
        self.resident += rows * resident
        self.full += rows * full

    def as_info(self) -> dict[str, Any]:
        """As results have it: means per context."""
        count = self.contexts
        return {
            "requests": self.requests,
            "contexts": count,
            "resident_bytes": self.resident / count if count else None,
            "full_bytes": self.full / count if count else None,
            "truncated_requests": self.truncated,
            "single_token_requests": self.single,
            "rolling_tokens": self.rolled,
            "rolling_tokens_uncompressed": self.plain,
        }
