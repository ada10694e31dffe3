"""Random attention inputs of a ragged batch, and the live part of each row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import LayerCache
from kvjax.compress.config import Compression
from kvjax.compress.layer import build
from kvjax.compress.observe import observe, wants_mass
from kvjax.compress.survey import survey
from kvjax.depth import Depth
from kvjax.pallas_kernels.partial import merge
from kvjax.prefills import Dense
from kvjax.rope import Rope
from kvjax.types import LayerInputs, LayerSpec, padded_positions

GARBAGE = 1e4
"""Size of what padding holds."""


def layer_spec(heads: int, kv_heads: int, head_dim: int, **fields) -> LayerSpec:
    """One of four full-attention layers, unless `fields` say otherwise."""
    given = {
        "num_layers": 4,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "rope": Rope(head_dim=head_dim),
    }
    return LayerSpec(**given | fields)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Inputs of one layer for a right-padded batch, padding full of large numbers."""

    inputs: LayerInputs
    lengths: np.ndarray

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Live `q [H, n, D]`, `k` and `v [K, n, D]` of a row in float64."""
        n = self.lengths[row]
        arrays = (self.inputs.q, self.inputs.k, self.inputs.v)
        q, k, v = (np.asarray(x, np.float64)[row, :, :n] for x in arrays)
        return q, k, v

    @property
    def w_o(self) -> np.ndarray:
        """Output projection `[H, D, E]`."""
        return np.asarray(self.inputs.o_proj, np.float64)

    @property
    def inv_freq(self) -> np.ndarray:
        """RoPE frequencies."""
        return self.inputs.spec.rope.frequencies()


SPECS = {"d16_g2": layer_spec(4, 2, 16), "d32_g3": layer_spec(6, 2, 32)}


def draw(seed: int, spec: LayerSpec, lengths: tuple[int, ...], width=None) -> Sample:
    """A sample of rows of `lengths`, padded to `width` (default: the longest)."""
    rng = np.random.default_rng(seed)
    rows, width = len(lengths), width or max(lengths)
    dead = np.arange(width) >= np.array(lengths)[:, None]

    def array(heads: int):
        x = rng.normal(size=(rows, heads, width, spec.head_dim))
        x = np.where(dead[:, None, :, None], GARBAGE * x, x)
        return jnp.asarray(x, jnp.float32)

    size = jnp.asarray(lengths, jnp.int32)
    o_proj = rng.normal(size=(spec.num_heads, spec.head_dim, 24))
    inputs = LayerInputs(
        q=array(spec.num_heads),
        k=array(spec.num_kv_heads),
        v=array(spec.num_kv_heads),
        positions=padded_positions(size, width),
        o_proj=jnp.asarray(o_proj, jnp.float32),
        retention=jnp.asarray(rng.normal(size=(rows, spec.num_kv_heads, width)), "f4"),
        spec=spec,
    )
    return Sample(inputs=inputs, lengths=np.array(lengths))


def decode_inputs(sample: Sample, start: np.ndarray, step: int) -> LayerInputs:
    """Token `start + step` of each row alone, as one decode step of the batch."""
    at = start + step
    rows = np.arange(len(start))

    def pick(x):
        return jnp.asarray(np.asarray(x)[rows, :, at][:, :, None])

    given = sample.inputs
    return dataclasses.replace(
        given,
        q=pick(given.q),
        k=pick(given.k),
        v=pick(given.v),
        positions=jnp.asarray(at[:, None], jnp.int32),
    )


def prefix(sample: Sample, lengths: np.ndarray) -> Sample:
    """The first `lengths` tokens of each row; what follows becomes padding."""
    given, width = sample.inputs, int(lengths.max())
    cut = {name: getattr(given, name)[:, :, :width] for name in ("q", "k", "v")}
    positions = padded_positions(jnp.asarray(lengths, jnp.int32), width)
    inputs = dataclasses.replace(given, positions=positions, **cut)
    return Sample(inputs=inputs, lengths=np.asarray(lengths))


def compressed(
    sample: Sample,
    c: Compression,
    *,
    room: int = 16,
    specs: tuple[LayerSpec, ...] = (),
    layer: int = 0,
) -> LayerCache:
    """One layer's cache after the sample as a prompt.

    `specs` are those of all layers; by default they are like the sample's.
    """
    every = specs or (sample.inputs.spec,) * sample.inputs.spec.num_layers

    @jax.jit  # one program compiles sooner than its operations one by one
    def cache(inputs, lengths):
        mass = Dense().attend(inputs, lengths, True)[1] if wants_mass(c) else None
        found = survey(c, every, lengths, inputs.k.shape[-2], inputs.k.dtype)
        layout, share = found.layouts[layer], found.of(Depth(layer=layer))
        seen = observe(inputs, lengths, layout.plan, mass)
        return build(seen, lengths, layout, share, room=room, layer=layer)[0]

    return cache(sample.inputs, jnp.asarray(sample.lengths, jnp.int32))


def full_row(sample: Sample, row: int, n: int):
    """`q, k, v` of the first `n` tokens of a row, whatever its length."""
    given = sample.inputs
    arrays = (given.q, given.k, given.v)
    q, k, v = (np.asarray(x, np.float64)[row, :, :n] for x in arrays)
    return q, k, v


def out_of(cache: LayerCache, sample: Sample, start: np.ndarray) -> np.ndarray:
    """What the next token of each row reads from the parts, itself left out."""

    @jax.jit
    def read(cache, inputs):
        given = (inputs.q, inputs.positions, cache.spec)
        return merge([part.attend(*given) for part in (*cache.parts, cache.tail)]).out

    return np.asarray(read(cache, decode_inputs(sample, start, 0)))
