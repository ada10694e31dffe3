"""What a model needs at any compression, context and batch, traced once each."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.compress.config import Compression
from kvjax.models import checks
from kvjax.models.config import DecoderConfig
from kvjax.models.padding import PROMPT, bucket
from kvjax.models.programs import abstract_model, left_by_prefill
from kvjax.models.sharding import parameter_sharding
from kvjax.models.weights import dotted
from kvjax.planning.sizes import Held, held_of
from kvjax.planning.temporaries import Widths
from kvjax.types import nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes of one chip.

    Attributes:
        weights: of the model.
        held: of the cache.
        decode, prefill: temporaries.
    """

    weights: int
    held: Held
    decode: int
    prefill: int

    @property
    def peak(self) -> int:
        """At once."""
        return self.weights + self.held.total + max(self.decode, self.prefill)


class Planner:
    """Sizes of one model at any compression, context and batch.

    Args:
        config: of the model.
        dtype: of its weights.
        new_tokens: of each row's context, those that are made.
        mesh: sizes of the axes `data` and `model`, which divide; empty: one chip.
    """

    def __init__(
        self,
        config: DecoderConfig,
        dtype: Any,
        new_tokens: int,
        mesh: Mapping[str, int],
    ):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.new_tokens, self.mesh = new_tokens, dict(mesh)
        self.rows, self.ways = mesh.get("data", 1), mesh.get("model", 1)
        sizes = (self.rows, self.ways)
        self._axes = jax.sharding.AbstractMesh(sizes, ("data", "model"))
        model = abstract_model(config, self.dtype)
        flat = nnx.to_flat_state(nnx.state(model))
        found = {dotted(path): leaf.get_value() for path, leaf in flat}
        self.weights = sum(self._share_of(path, x) for path, x in found.items())
        layers = {p: x for p, x in found.items() if "layers" in p.split(".")}
        self.kernels = sum(x.size for p, x in layers.items() if p.endswith("kernel"))
        layer = sum(self._share_of(p, x) for p, x in layers.items())
        # A step reads a row of the embedding per token, unless the head is it, too.
        table = 0 if config.tie_embeddings else nbytes(found["embedding"]) // self.ways
        self.read_weights = self.weights - table
        share = _share(config, self.ways)
        self.widths = Widths(
            config=share,
            itemsize=self.dtype.itemsize,
            layer=layer // config.num_layers,
        )
        self.model = model
        self.share = model if self.ways == 1 else abstract_model(share, self.dtype)
        self._held = functools.lru_cache(maxsize=None)(self._traced)

    def _share_of(self, path: str, x: Any) -> int:
        where = parameter_sharding(path, x.shape, self._axes)  # type: ignore[arg-type]
        return math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize

    def check(self, c: Compression, context: int, batch: int) -> None:
        """The compression is one for this model and for such prompts.

        Raises:
            ValueError: it is not; says which setting, and what to change.
        """
        lengths = np.full((batch,), context - self.new_tokens, np.int32)
        checks.compression(self.config, c, lengths)  # type: ignore[arg-type]
        budgets = [p.evict.budget.bytes for p in c.parts if p.evict is not None]
        if self.ways > 1 and any(given is not None for given in budgets):
            raise ValueError(
                "a budget in bytes is of all KV heads, and the plan of several chips "
                "is of one chip's; got evict.budget.bytes. Give `keep` or `slots`."
            )

    def held(self, c: Compression, context: int, batch: int) -> Held:
        """The cache of one chip, by the shapes that `prefill` leaves."""
        prompt = context - self.new_tokens
        wide = max(min(bucket(prompt), bucket(prompt, PROMPT)), 1)
        return self._held(c, wide, -(-batch // self.rows))

    def _traced(self, c: Compression, prompt: int, batch: int) -> Held:
        left = left_by_prefill(self.share, batch, prompt, c, self.new_tokens)
        return held_of(left[1])

    def needs(self, c: Compression, context: int, batch: int, kind: str) -> Needs:
        """Bytes of one chip of a kind (`cpu`, `tpu`, `gpu`)."""
        held = self.held(c, context, batch)
        known = (held.scales, held.total)
        decode, prefill = self._temporaries(c, context, batch, *known, kind)
        return Needs(weights=self.weights, held=held, decode=decode, prefill=prefill)

    def expected(
        self,
        c: Compression,
        context: int,
        batch: int,
        kind: str,
        cache: Held,
        share: float,
    ) -> int:
        """About the peak, if the cache is `share` of a known one; nothing is traced."""
        scales = int(cache.scales * share)
        total = int(cache.total * share)
        beside = self._temporaries(c, context, batch, scales, total, kind)
        return self.weights + total + max(beside)

    def _temporaries(
        self,
        c: Compression,
        context: int,
        batch: int,
        scales: int,
        cache: int,
        kind: str,
    ) -> tuple[int, int]:
        rows = -(-batch // self.rows)
        prompt = bucket(context - self.new_tokens, PROMPT)
        decode = self.widths.decode(rows, scales, kind)
        return decode, self.widths.prefill(c, rows, prompt, cache, kind)


def _share(config: DecoderConfig, ways: int) -> DecoderConfig:
    """The heads and columns of one chip out of `ways`."""
    if ways == 1:
        return config
    heads = config.num_kv_heads // ways
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // ways,
        num_kv_heads=heads,
        intermediate_size=config.intermediate_size // ways,
        vocab_size=config.vocab_size // ways,
        head_gates=tuple(row[:heads] for row in config.head_gates),
    )
