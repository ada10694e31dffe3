"""Tokens in clusters of like keys: some are read, some estimated, the rest left out."""

from typing import ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import exact
from kvjax.cache.kmeans import clustered
from kvjax.cache.paging import PageBudget, log_shares, most_pages
from kvjax.cache.selecting import AbstractSelecting
from kvjax.pallas_kernels.partial import Partial, merge, softmax_partial
from kvjax.pallas_kernels.slots import slot_logits
from kvjax.turns import take
from kvjax.types import NEVER, pytree, static


class Zones(NamedTuple):
    """What becomes of each cluster, the best first; of all query tokens.

    Attributes:
        cluster: which one it is.
        size: its tokens.
        read: its tokens are read.
        estimated: it is attended to as a whole.
    """

    cluster: Int[Array, "B K T C"]
    size: Int[Array, "B K T C"]
    read: Bool[Array, "B K T C"]
    estimated: Bool[Array, "B K T C"]


@final
@pytree
class Clustered(AbstractSelecting):
    """All tokens, in clusters of like keys inside of segments of `segment` slots.

    A query token finds, per KV head, its zones:
      * steady: the first `sinks` tokens of the row, which are in no cluster, and the
        last `local` ones in front of it; always read.
      * retrieval: of the clusters with the largest softmax share of `q . centre`,
        summed over the group, those whose tokens fit into the budget together; read.
      * estimation: the next `estimate` of the clusters, each of which counts as `size`
        tokens with the mean key and the mean value.
    The rest is left out. A cluster that the query does not see as a whole, or part of
    which is in the steady zone, is not estimated.

    `centre`, `mean`: mean key and value. `size [.., C, 1]`; `span [.., C, 2]`: oldest
    and newest position. `order [.., S, 1]`: the slots of each segment, cluster by
    cluster.
    """

    centre: Float[Array, "*layers B K C D"]
    mean: Float[Array, "*layers B K C D"]
    size: Int[Array, "*layers B K C 1"]
    span: Int[Array, "*layers B K C 2"]
    order: Int[Array, "*layers B K S 1"]
    budget: PageBudget = static()
    segment: int = static()
    cluster: int = static()
    iterations: int = static()
    estimate: float = static()
    sinks: int = static()
    local: int = static()

    SUMMARY: ClassVar = ("centre", "mean", "size", "span", "order")

    def summary(self, keys, values, positions):
        how = (self.segment, self.cluster, self.iterations, self.sinks)
        return clusters_of(keys, values, positions, *how)

    @property
    def most(self):
        return most_pages(self.budget, self.slots)

    def zones(self, q, q_positions, spec, limit=None, turn=None) -> Zones:
        """What becomes of each cluster; arguments are those of `attend`."""
        centre, size, span = take((self.centre, self.size, self.span), turn)
        first = jnp.where(size[..., 0] > 0, span[..., 0], NEVER)
        last, asked = span[..., 1], q_positions[:, None, :, None]
        seen = self.seen(first, last, q_positions, limit, spec)
        share = log_shares(*jax.lax.stop_gradient((q, centre)), seen, spec)
        score = jnp.where(seen, jax.nn.logsumexp(share, axis=2), -jnp.inf)
        best, rank = jax.lax.top_k(score, score.shape[-1])

        def of(x: Array) -> Array:
            return jnp.take_along_axis(jnp.broadcast_to(x, rank.shape), rank, axis=-1)

        size, live = of(size[:, :, None, :, 0]), best > -jnp.inf
        held = self.held(limit, turn)
        allowed = self.budget.read(held)[:, None, :, None]
        fits = live & (size <= allowed)
        read = fits & (jnp.cumsum(jnp.where(fits, size, 0), axis=-1) <= allowed)
        left = live & ~read
        inside = last[:, :, None] <= asked - self.local
        if spec.window is not None:
            inside = inside & (first[:, :, None] > asked - spec.window)
        some = exact.ceil_share(held // self.cluster, self.estimate)
        nearest = jnp.cumsum(left, axis=-1) <= some[:, None, :, None]
        return Zones(rank, size, read, left & of(inside) & nearest)

    def select(self, q, q_positions, spec, limit=None, turn=None):
        zones = self.zones(q, q_positions, spec, limit, turn)
        return self.steady_and(zones, q_positions, limit, turn)

    def steady_and(self, zones: Zones, q_positions, limit, turn):
        """Slots of the steady zone and of the clusters that are read; see `select`."""
        positions = take(self.positions, turn)[:, :, None]
        asked = q_positions[:, None, :, None]
        lead, slots = zones.read.shape[:3], positions.shape[-1]
        recent = asked - self.local

        def at(slot: Array) -> tuple[Array, Array]:
            slot = jnp.broadcast_to(slot, (*lead, slot.shape[-1]))
            return slot, jnp.take_along_axis(positions, slot, axis=-1)

        first, where = at(jnp.arange(min(self.sinks, slots)))
        sink = (where >= 0) & (where < self.sinks)
        edge = self.held(limit, turn)[:, None, :, None]
        last = edge - 1 - jnp.arange(min(self.local, slots))
        newest, where = at(jnp.maximum(last, 0))
        near = (last >= 0) & (where >= self.sinks) & (where > recent)
        token, mine = self._tokens(zones, take((self.size, self.order), turn))
        token, where = at(token)
        index = jnp.concatenate([first, newest, token], axis=-1)
        return index, jnp.concatenate([sink, near, mine & (where <= recent)], axis=-1)

    def _tokens(self, zones: Zones, held: tuple[Array, Array]) -> tuple[Array, Array]:
        """Slots of the clusters that are read, in a row, and which of them count."""
        size, order = (x[..., 0] for x in held)
        *lead, clusters = zones.read.shape
        each = self.segment // self.cluster
        # Where each cluster begins in its segment.
        sizes = size.reshape(*size.shape[:2], -1, each)
        begin = (jnp.cumsum(sizes, axis=-1) - sizes).reshape(size.shape)
        ends = jnp.cumsum(jnp.where(zones.read, zones.size, 0), axis=-1)
        token = jnp.arange(self.most)
        found = jax.vmap(lambda x: jnp.searchsorted(x, token, side="right"))
        rank = found(ends.reshape(-1, clusters)).reshape(*lead, self.most)
        rank = jnp.minimum(rank, clusters - 1)

        def ranked(x: Array) -> Array:
            return jnp.take_along_axis(x, rank, axis=-1)

        cluster = ranked(zones.cluster)
        before = token - (ranked(ends) - ranked(zones.size))
        start = cluster // each * self.segment
        begin = jnp.take_along_axis(begin[:, :, None], cluster, axis=-1)
        mine = token < ends[..., -1:]
        place = jnp.where(mine, start + begin + before, 0)
        slot = start + jnp.take_along_axis(order[:, :, None], place, axis=-1)
        return slot, mine

    def attend(self, q, q_positions, spec, limit=None, turn=None):
        zones = self.zones(q, q_positions, spec, limit, turn)
        chosen = self.steady_and(zones, q_positions, limit, turn)
        read = self.attend_chosen(q, q_positions, chosen, spec, turn)
        return merge([read, self.estimated(q, zones, spec, turn)])

    def estimated(self, q, zones: Zones, spec, turn=None) -> Partial:
        """Attention over the clusters of the estimation zone, each as its mean."""
        centre, mean, size = take((self.centre, self.mean, self.size), turn)
        (b, h, t, _), (_, kv_heads, clusters, _) = q.shape, centre.shape
        lead = jnp.indices((b, kv_heads, t, 1), sparse=True)[:3]
        mask = jnp.zeros(zones.estimated.shape, jnp.bool_)
        mask = mask.at[(*lead, zones.cluster)].set(zones.estimated)
        logits = slot_logits(q, centre, scale=spec.scale, softcap=spec.softcap)
        count = jnp.maximum(size[:, :, None, None, :, 0], 1).astype(jnp.float32)
        logits = logits + jnp.log(count)
        mask = jnp.broadcast_to(mask[:, :, None], logits.shape)
        rows = (b, kv_heads, h // kv_heads * t, clusters)
        part = softmax_partial(logits.reshape(rows), mask.reshape(rows), mean)
        return Partial(part.out.reshape(b, h, t, -1), part.lse.reshape(b, h, t))


def clusters_of(
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    positions: Int[Array, "B K S"],
    segment: int,
    cluster: int,
    iterations: int,
    sinks: int,
) -> dict[str, Array]:
    """`Clustered.SUMMARY` of whole segments; `sinks` first tokens are in no cluster."""

    def segments(x: Array) -> Array:
        return x.reshape(-1, segment, *x.shape[3:])

    found = clustered(
        segments(keys),
        segments(values),
        segments(positions),
        segments(positions) >= sinks,
        count=segment // cluster,
        iterations=iterations,
    )
    lead = positions.shape[:2]
    return {
        "centre": found.key.reshape(*lead, -1, keys.shape[-1]),
        "mean": found.value.reshape(*lead, -1, values.shape[-1]),
        "size": found.size.reshape(*lead, -1, 1),
        "span": found.span.reshape(*lead, -1, 2),
        "order": found.order.reshape(*lead, -1, 1),
    }
