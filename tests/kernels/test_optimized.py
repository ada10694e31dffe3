"""What the ops are to XLA's optimisation, which other tests nearly do without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels.held import held_attention
from kvjax.pallas_kernels.page_score import page_score

pytestmark = pytest.mark.optimized


def test_the_marker_is_heeded():
    assert not jax.config.read("jax_disable_most_optimizations")


def test_many_bfloat16_pages():
    """The largest of two products, which one fused kernel of XLA gets wrong."""
    rng = np.random.default_rng(7)
    shapes = (1, 32, 1, 128), (1, 8, 2048, 128), (1, 8, 2048, 128)
    args = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes]
    score = jax.jit(functools.partial(page_score, mode="bound", group="max"))(*args)
    assert np.isfinite(score).all()


def test_temporaries_are_linear():
    """Twice the tokens need twice the memory, in the backward pass too."""

    def temporaries(tokens):
        shape = jax.ShapeDtypeStruct((1, 2, tokens, 16), jnp.float32)
        at = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

        def loss(q, k, v, positions):
            return held_attention(q, k, v, positions, scale=0.25).sum()

        made = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        analysis = made.lower(shape, shape, shape, at).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    small, large = temporaries(4096), temporaries(8192)
    assert large < 2.2 * small
