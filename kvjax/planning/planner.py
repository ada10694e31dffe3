"""What a model needs at any compression, context and batch, traced once each."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from kvjax import axes
from kvjax.cache import host_nbytes, spread
from kvjax.compress.config import Compression
from kvjax.models import checks
from kvjax.models.config import DecoderConfig
from kvjax.models.padding import PROMPT, bucket, widest
from kvjax.models.programs import abstract_model, between_chunks, left_by_prefill
from kvjax.models.sharding import RULES, parameter_sharding
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

    Attributes:
        config, dtype, new_tokens, mesh: as given.
        rows, ways: sizes of `data` and `model`.
        model: the decoder, its arrays shapes.
        weights: bytes of them on one chip.
        read_weights: of these, what a decode step reads.
        kernels: numbers in the layers' matrices, on all chips.
        widths: what formulas know of one chip's share.
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
        self._axes = AbstractMesh(sizes, ("data", "model"), (AxisType.Auto,) * 2)
        self.model = model = abstract_model(config, self.dtype)
        flat = nnx.to_flat_state(nnx.state(model))
        found = {dotted(path): leaf.get_value() for path, leaf in flat}
        self.weights = sum(self._share_of(path, x) for path, x in found.items())
        layers = {p: x for p, x in found.items() if "layers" in p.split(".")}
        self.kernels = sum(x.size for p, x in layers.items() if p.endswith("kernel"))
        layer = sum(self._share_of(p, x) for p, x in layers.items())
        # A step reads a row of the embedding per token, unless the head is it, too.
        table = 0 if config.tie_embeddings else nbytes(found["embedding"]) // self.ways
        self.read_weights = self.weights - table
        self.widths = Widths(
            config=_share(config, self.ways),
            itemsize=self.dtype.itemsize,
            layer=layer // config.num_layers,
        )
        self._held = functools.lru_cache(maxsize=None)(self._traced)

    def _share_of(self, path: str, x: Any) -> int:
        where = parameter_sharding(path, x.shape, self._axes)  # type: ignore[arg-type]
        return math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize

    def check(self, c: Compression, context: int, batch: int) -> None:
        """The compression is one for this model and for such prompts.

        Raises:
            ValueError: it is not; says which setting, and what to change.
        """
        prompt = np.array([context - self.new_tokens], np.int32)  # of all rows
        checks.compression(self.config, c, prompt)  # type: ignore[arg-type]

    def held(self, c: Compression, context: int, batch: int) -> Held:
        """The cache of one chip, by the shapes that `prefill` leaves."""
        prompt = context - self.new_tokens
        return self._held(c, max(widest(prompt), 1), batch)

    def _traced(self, c: Compression, prompt: int, batch: int) -> Held:
        # As programs are traced for a mesh: what a device holds is by the same table.
        with axes.split(self._axes, tuple(sorted(RULES.items()))):
            _, cache = left_by_prefill(self.model, batch, prompt, c, self.new_tokens)
            held = held_of(cache, spread.share(cache))
        if c.schedule.chunk is None:
            return held
        given = (self.model, batch, prompt, c, self.new_tokens)
        grown, rest = map(self._on_chip, between_chunks(*given))
        made = max(held.total - grown, 0)  # what has grown is the cache
        return dataclasses.replace(
            held, between=grown + rest, closing=grown + rest + made
        )

    def _on_chip(self, tree: Any) -> int:
        """Bytes on the device, of one chip if all of it is split."""
        return (nbytes(tree) - host_nbytes(tree)) // (self.rows * self.ways)

    def needs(self, c: Compression, context: int, batch: int, kind: str) -> Needs:
        """Bytes of one chip of a kind (`cpu`, `tpu`, `gpu`)."""
        held = self.held(c, context, batch)
        decode, prefill = self._temporaries(c, context, batch, held, kind)
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
        held = cache.times(share)
        beside = self._temporaries(c, context, batch, held, kind)
        return self.weights + held.total + max(beside)

    def _temporaries(
        self,
        c: Compression,
        context: int,
        batch: int,
        held: Held,
        kind: str,
    ) -> tuple[int, int]:
        rows = -(-batch // self.rows)
        prompt = bucket(context - self.new_tokens, PROMPT)
        decode = self.widths.decode(rows, held.scales, kind)
        prefill = self.widths.prefill(c, rows, prompt, held.between, kind)
        if c.schedule.chunk is not None:
            # Beside the weights alone; what is held becomes the cache, or makes it.
            most = max(held.between + prefill, held.closing)
            prefill = max(most - held.total, 0)
        return decode, prefill


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
