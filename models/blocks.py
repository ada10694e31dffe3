"""What a decoder is made of: linear maps, norms, attention, feed-forward, a layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvjax import axes
from kvjax.depth import Depth
from kvjax.models.config import DecoderConfig
from kvjax.pallas_kernels.partial import feature_sum
from kvjax.types import LayerInputs, LayerSpec

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


COLUMNS = 16
"""Of a product: XLA on a CPU sums those beyond a multiple of this in another order
where there are few rows, and a row would not be what it is in a larger batch."""


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel `[in, out]`."""

    def __init__(
        self, n_in: int, n_out: int, *, bias: bool, std: float, dtype, rngs: nnx.Rngs
    ):
        noise = jax.random.normal(rngs.params(), (n_in, n_out), jnp.float32)
        self.kernel = nnx.Param((noise * std).astype(dtype))
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None

    @property
    def matrix(self) -> Float[Array, "in out"]:
        """The matrix that inputs are multiplied with."""
        return self.kernel[...]

    def __call__(self, x: Float[Array, "*shape in"]) -> Float[Array, "*shape out"]:
        """`[..., in]` to `[..., out]`, in the dtype of the kernel."""
        kernel, size = self.kernel[...], self.kernel.shape[1]
        if over := -size % COLUMNS:
            kernel = jnp.pad(kernel, [(0, 0), (0, over)])
        y = product(x, kernel, contract=0)[..., :size]
        return y if self.bias is None else y + _trailing(self.bias[...], y)


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` in float32, back in the dtype of `x`."""

    def __init__(self, size: int, *, eps: float, offset: bool, dtype):
        self.eps = eps
        self.offset = offset
        self.weight = nnx.Param(jnp.full((size,), 0.0 if offset else 1.0, dtype))

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        """`x` normed over its last axis."""
        wide = x.astype(jnp.float32)
        square = feature_sum(wide * wide)[..., None] / x.shape[-1]
        weight = self.weight[...].astype(jnp.float32) + (1.0 if self.offset else 0.0)
        normed = wide * jax.lax.rsqrt(square + self.eps) * _trailing(weight, x)
        return normed.astype(x.dtype)


class SelfAttention(nnx.Module):
    """Projections, q/k norm and RoPE around the attention callback."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        e, d = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads * d, config.num_kv_heads * d
        std, bias = config.init_std, config.qkv_bias
        self.q = Linear(e, heads, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.k = Linear(e, kv_heads, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.v = Linear(e, kv_heads, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.o = Linear(heads, e, bias=config.o_bias, std=std, dtype=dtype, rngs=rngs)
        self.q_norm = norm_of(config, d, dtype) if config.qk_norm else None
        self.k_norm = norm_of(config, d, dtype) if config.qk_norm else None
        self.evictor = config.evictor
        own = config.evictor is not None and config.evictor.kind == "mlp"
        head = RetentionHead(config, dtype=dtype, rngs=rngs) if own else None
        self.retention = head
        sides = config.projection.sides if config.projection else ()
        unit = jnp.broadcast_to(jnp.eye(d, dtype=dtype), (config.num_kv_heads, d, d))
        self.key_basis = nnx.Param(unit) if "key" in sides else None
        self.value_basis = nnx.Param(unit) if "value" in sides else None

    def __call__(
        self, x: Array, positions: Array, spec: LayerSpec, depth: Depth, attend
    ) -> tuple[Array, Any]:
        """`[B T E]` to `[B T E]`, and what else `attend` returns; calls it once."""
        b, t, e = x.shape
        h, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q = self.q(x).reshape(b, t, h, d)
        k = self.k(x).reshape(b, t, kv_heads, d)
        v = self.v(x).reshape(b, t, kv_heads, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, retention = self._retention(x, q)
        q, k, v = (by_heads(one) for one in (q, k, v))
        turn = jnp.maximum(positions, 0)[:, None, :]
        inputs = LayerInputs(
            q=spec.rope.rotate(q.transpose(0, 2, 1, 3), turn),
            k=spec.rope.rotate(k.transpose(0, 2, 1, 3), turn),
            v=v.transpose(0, 2, 1, 3),
            positions=positions,
            o_proj=self.o.matrix.reshape(h, d, e),
            retention=retention,
            key_basis=None if self.key_basis is None else self.key_basis[...],
            value_basis=None if self.value_basis is None else self.value_basis[...],
            depth=depth,
            spec=spec,
        )
        out, *more = attend(inputs)
        out = out.astype(x.dtype).transpose(0, 2, 1, 3)
        return self.o(out.reshape(b, t, h * d)), more

    def _retention(self, x: Array, q: Array) -> tuple[Array, Array | None]:
        """Queries `[B T H D]` without a borrowed channel, and `retention [B K T]`."""
        if self.evictor is None:
            return q, None
        if self.retention is not None:
            return q, self.retention(x)
        groups = q.shape[2] // (self.k.kernel.shape[-1] // q.shape[3])
        lent = q[:, :, ::groups, -1].astype(jnp.float32)
        q = q.at[:, :, ::groups, -1].set(0)
        evict = self.evictor.gain * lent - self.evictor.offset
        return q, -evict.transpose(0, 2, 1)


def by_heads(x: Float[Array, "B T X D"]) -> Float[Array, "B T X D"]:
    """Queries, keys or values split along rows and heads, if the trace is for a mesh.

    Query heads go with the KV heads that they read.
    """
    return axes.laid_out(x, ("batch", None, "kv_heads", None))


class RetentionHead(nnx.Module):
    """`retention` of every token and KV head from what enters attention."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        assert config.evictor is not None
        e, f, std = config.hidden_size, config.evictor.hidden, config.init_std
        k = config.num_kv_heads
        self.up = Linear(e, f, bias=True, std=std, dtype=dtype, rngs=rngs)
        self.down = Linear(f, k, bias=True, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B K T"]:
        """Float32."""
        out = self.down(jax.nn.gelu(self.up(x)))
        return out.astype(jnp.float32).transpose(0, 2, 1)


class FeedForward(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        e, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        std = config.init_std
        self.activation = config.activation
        self.gate = Linear(e, f, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.up = Linear(e, f, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.down = Linear(f, e, bias=bias, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """`[B T E]` to `[B T E]`."""
        return self.down(_ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One pre-norm residual layer."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        e, post = config.hidden_size, config.post_norms
        self.attention_norm = norm_of(config, e, dtype)
        self.attention = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_norm = norm_of(config, e, dtype) if post else None
        self.mlp_norm = norm_of(config, e, dtype)
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)
        self.post_mlp_norm = norm_of(config, e, dtype) if post else None

    def __call__(
        self, x: Array, positions: Array, spec: LayerSpec, depth: Depth, attend
    ) -> tuple[Array, Any]:
        """The residual stream after this layer, and what else `attend` returns."""
        normed = self.attention_norm(x)
        y, more = self.attention(normed, positions, spec, depth, attend)
        x = x + (y if self.post_attention_norm is None else self.post_attention_norm(y))
        y = self.mlp(self.mlp_norm(x))
        x = x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y))
        return x, more


def norm_of(config: DecoderConfig, size: int, dtype) -> RMSNorm:
    """A norm over `size` channels, as the family has it."""
    return RMSNorm(size, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)


def product(x: Array, kernel: Array, *, contract: int, dtype=None) -> Array:
    """`x @ kernel` over the kernel's axis `contract`, accumulated in float32."""

    def dot(x: Array, kernel: Array) -> Array:
        # Rows of one matrix: with a batch axis, XLA on a CPU lays the gradient of the
        # kernel out so that a training step takes a quarter longer.
        rows = x.reshape(-1, x.shape[-1])
        dims = (((1,), (contract,)), ((), ()))
        y = jax.lax.dot_general(rows, kernel, dims, preferred_element_type=dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    if x.size > x.shape[-1] or kernel.dtype.itemsize > 2:
        return dot(x, kernel)

    def two_rows(x: Array, kernel: Array) -> Array:
        row = x.reshape(1, -1)
        return dot(jnp.concatenate([row, row]), kernel)[:1].reshape(*x.shape[:-1], -1)

    # XLA on a CPU widens the whole kernel to float32 to multiply one 16-bit row by it,
    # at each step; two rows take the native product, 15 times as fast.
    return jax.lax.platform_dependent(x, kernel, cpu=two_rows, default=dot)


def _trailing(weight: Array, x: Array) -> Array:
    """`weight [n]` with the rank of `x`, so that nothing promotes ranks implicitly."""
    return weight.reshape((1,) * (x.ndim - 1) + weight.shape)
