"""Clusters of like keys: the best are read, the next estimated (RetroInfer)."""

import dataclasses
from typing import Annotated, final

from kvjax.cache import Clustered, clusters_of
from kvjax.config import sized
from kvjax.fields import Count, Fraction, Range, Size
from kvjax.reads.base import AbstractBudgeted


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RetroInfer(AbstractBudgeted):
    """Tokens of the clusters that a query looks at; of others the mean, weighed.

    Keys are clustered by spherical k-means inside of segments. A step reads the first
    tokens of the row and the last in front of the query, beside the budget; then whole
    clusters, the best first, as long as they fit into it. The next ones are estimated:
    as if each of their tokens had the mean key and the mean value of the cluster. The
    rest is left out. Later tokens are read as they are until a segment of them is full,
    which is then clustered by itself.

    Attributes:
        segment: tokens that are clustered by themselves.
        cluster: tokens of a cluster, on average.
        iterations: of k-means.
        estimate: fraction of the clusters that are estimated, at most.
        sinks: first tokens of a row, which are in no cluster.
        local: last tokens in front of a query.

    Source: RetroInfer (2505.02922) and `microsoft/RetrievalAttention` at 6b1228c
    (clusters of 16, 10 iterations, 1.8 % read, 23.2 % estimated, 4 sinks, 64 local).
    Deviations: the budget counts tokens, not clusters, so that shapes are static: one
    that does not fit is estimated; segments have one length, there 8192 for prompts and
    1024 later; what is behind the last whole one is read. A cluster with local tokens
    in it is not estimated. `store.place` says where clusters lie, there in the host's
    memory; nothing is cached between steps.
    """

    keep: Fraction | None = 0.018
    segment: Size = sized(256, short=16)
    cluster: Size = sized(16, short=4)
    iterations: Annotated[int, Range(1, 1000)] = 10
    estimate: Annotated[float, Range(0, 1)] = 0.232
    sinks: Count = 4
    local: Count = sized(64, short=8, recent=True)

    def __post_init__(self):
        super().__post_init__()
        if self.segment % self.cluster or self.sinks > self.segment:
            raise ValueError(
                "`segment` must be a multiple of `cluster` and at least `sinks`; got "
                f"segment={self.segment}, cluster={self.cluster}, sinks={self.sinks}. "
                "Use 256 and 16."
            )

    @property
    def block(self):
        return self.segment

    def index(self, part, exact, seen, spec):
        del exact, seen
        assert part.filled is not None
        keys, values = (
            side.decode(part.positions, spec.rope) for side in (part.keys, part.values)
        )
        how = (self.segment, self.cluster, self.iterations, self.sinks)
        clustered = Clustered(
            keys=part.keys,
            values=part.values,
            positions=part.positions,
            filled=part.filled,
            page=1,
            budget=self.budget,
            segment=self.segment,
            cluster=self.cluster,
            iterations=self.iterations,
            estimate=self.estimate,
            sinks=self.sinks,
            local=self.local,
            **clusters_of(keys, values, part.positions, *how),
        )
        return (clustered,)
