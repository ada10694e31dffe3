"""`LayerCache` and `KVCache`: values, never mutated; one layer attends and grows."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.parts import AbstractPart, Growth, Slots
from kvjax.cache.tail import Tail
from kvjax.cache.tracking import AbstractTracker, Tracking, fold
from kvjax.pallas_kernels.partial import merge
from kvjax.types import LayerInputs, LayerSpec, nbytes, pytree, static


@pytree
class LayerCache:
    """The cache of one layer: parts that attend by themselves, and a plain tail.

    Attributes:
        parts: compressed bodies; `parts[0]` is the one that grows or is folded into.
        tail: the newest tokens, plain.
        tracking: what decode-time eviction remembers, or None.
        spec: the layer's attention.
        growth: full tails move into the body as encoded blocks, or None.
        tracker: full tails are folded into a bounded body, or None.
    """

    parts: tuple[AbstractPart, ...]
    tail: Tail
    tracking: Tracking | None = None
    spec: LayerSpec = static()
    growth: Growth | None = static(default=None)
    tracker: AbstractTracker | None = static(default=None)

    def attend(self, inputs: LayerInputs) -> tuple[Float[Array, "B H T D"], Self]:
        """Attention of new tokens over the cache and themselves; the cache after."""
        tokens = inputs.q.shape[2]
        if self.growth is None and self.tracker is None:
            cache = dataclasses.replace(
                self, tail=self.tail.append(inputs.k, inputs.v, inputs.positions)
            )
            return cache._read(inputs), cache
        if tokens == 1:
            return self._step(inputs)

        def one(cache: Self, x):
            q, k, v, positions = (y[:, :, None] if y.ndim > 2 else y for y in x)
            step = dataclasses.replace(
                inputs, q=q, k=k, v=v, positions=positions[:, None]
            )
            out, cache = cache._step(step)
            return cache, out[:, :, 0]

        by_token = [jnp.moveaxis(x, 2, 0) for x in (inputs.q, inputs.k, inputs.v)]
        cache, out = jax.lax.scan(
            one, self, (*by_token, jnp.moveaxis(inputs.positions, 1, 0))
        )
        return jnp.moveaxis(out, 0, 2), cache

    def _read(self, inputs: LayerInputs) -> Array:
        read = (inputs.q, inputs.positions, self.spec)
        return merge([part.attend(*read) for part in (*self.parts, self.tail)]).out

    def _step(self, inputs: LayerInputs) -> tuple[Array, Self]:
        """One token per row: append, attend, then move a full tail into the body."""
        tail = self.tail.append(inputs.k, inputs.v, inputs.positions)
        cache = dataclasses.replace(self, tail=tail)
        out = cache._read(inputs)
        if self.tracker is not None:
            cache = cache._track(inputs)
        full = cache.tail.used >= cache.tail.capacity
        if self.tracker is None:
            out, cache = jax.lax.optimization_barrier((out, cache))
            return out, cache._grow(full)
        if cache.tail.capacity == 1:
            return out, cache._fold(full)
        return out, jax.lax.cond(
            jnp.any(full), lambda c: c._fold(full), lambda c: c, cache
        )

    def _track(self, inputs: LayerInputs) -> Self:
        assert self.tracker is not None and self.tracking is not None
        state = self.tracker.update(
            self.tracking.state,
            inputs.q,
            inputs.positions,
            self._body(),
            self.tail,
            self.spec,
        )
        tracking = dataclasses.replace(self.tracking, state=state)
        return dataclasses.replace(self, tracking=tracking)

    def _body(self) -> Slots:
        body = self.parts[0]
        assert isinstance(body, Slots)
        return body

    def _fold(self, rows: Bool[Array, "B"]) -> Self:
        assert self.tracker is not None and self.tracking is not None
        body, tail, tracking = fold(
            self.tracker, self.tracking, self._body(), self.tail, self.spec, rows
        )
        return dataclasses.replace(
            self, parts=(body, *self.parts[1:]), tail=tail, tracking=tracking
        )

    def _grow(self, rows: Bool[Array, "B"]) -> Self:
        assert self.growth is not None
        body = self.parts[0].grow(self.tail, rows, self.growth, self.spec)
        tail = dataclasses.replace(
            self.tail,
            positions=jnp.where(rows[:, None, None], -1, self.tail.positions),
            used=jnp.where(rows, 0, self.tail.used),
        )
        return dataclasses.replace(self, parts=(body, *self.parts[1:]), tail=tail)

    @property
    def overflow(self) -> Bool[Array, "B"]:
        """Rows that were given more tokens than fit; their results are wrong."""
        over = self.tail.used > self.tail.capacity
        free = self.parts[0].free if self.parts else None
        return over if free is None else over | (free < 0)

    @property
    def room(self) -> Int[Array, "B"] | None:
        """Tokens that still fit into each row, or None if the layer is bounded."""
        if self.tracker is not None:
            return None
        left = self.tail.capacity - self.tail.used
        free = self.parts[0].free if self.parts else None
        if self.growth is None or free is None:
            return left
        # A tail is moved as soon as it is full: the last slot must stay free unless
        # the body takes another block.
        return left - 1 + free // self.growth.block * self.growth.block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a cache comes from; two caches mix only if these are equal.

    Attributes:
        model: digest of the configuration of the model.
        compression: the compression's YAML, canonical.
        query_aware: whether scores saw the question: if so, it is nobody's prefix.
    """

    model: str
    compression: str
    query_aware: bool


@pytree
class KVCache:
    """The keys and values of a batch of sequences, a value.

    Attributes:
        layers: one `LayerCache` per layer; capacities may differ.
        length: tokens seen by each row, the position of its next one.
        provenance: what made it.
    """

    layers: tuple[LayerCache, ...]
    length: Int[Array, "B"]
    provenance: Provenance | None = static(default=None)

    @property
    def nbytes(self) -> int:
        """Bytes held, side state (positions, scales, statistics) included."""
        return nbytes(self)

    @property
    def room(self) -> int | None:
        """Tokens that still fit into every row, or None if the cache is bounded.

        Reads the device; not for use under `jit`.
        """
        rooms = [layer.room for layer in self.layers]
        known = [int(jnp.min(room)) for room in rooms if room is not None]
        return min(known) if known else None

    def kept_positions(self, layer: int) -> list[list[np.ndarray]]:
        """Sorted original positions still attended, per row and KV head."""
        cache = self.layers[layer]
        held = [part.live_positions() for part in (*cache.parts, cache.tail)]
        rows = []
        for row in zip(*held, strict=True):
            heads = [np.sort(np.concatenate(head)) for head in zip(*row, strict=True)]
            rows.append(heads)
        return rows
