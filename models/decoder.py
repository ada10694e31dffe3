"""The decoder: one NNX module for every family; attention is the caller's.

`Decoder.__call__` walks the layers in order and hands each one's rotated queries and
keys to a callback, so a dense pass, a prefill that fills a cache, a decode step that
reads one, and training's parallel form are the same model with another callback.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.models.carrying import Attention as Attention
from kvjax.models.carrying import Carrying as Carrying
from kvjax.models.config import DecoderConfig
from kvjax.models.walk import walk
from kvjax.types import LayerInputs, LayerSpec

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


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
        y = _product(x, self.kernel[...], contract=0)
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
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
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
        self.q_norm = _norm(config, d, dtype) if config.qk_norm else None
        self.k_norm = _norm(config, d, dtype) if config.qk_norm else None
        self.evictor = config.evictor
        own = config.evictor is not None and config.evictor.kind == "mlp"
        head = RetentionHead(config, dtype=dtype, rngs=rngs) if own else None
        self.retention = head
        sides = config.projection.sides if config.projection else ()
        unit = jnp.broadcast_to(jnp.eye(d, dtype=dtype), (config.num_kv_heads, d, d))
        self.key_basis = nnx.Param(unit) if "key" in sides else None
        self.value_basis = nnx.Param(unit) if "value" in sides else None

    def __call__(
        self, x: Array, positions: Array, spec: LayerSpec, attention: Attention
    ) -> Array:
        """`[B T E]` to `[B T E]`; calls `attention` once."""
        b, t, e = x.shape
        h, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q = self.q(x).reshape(b, t, h, d)
        k = self.k(x).reshape(b, t, kv_heads, d)
        v = self.v(x).reshape(b, t, kv_heads, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, retention = self._retention(x, q)
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
            spec=spec,
        )
        out = attention(inputs).astype(x.dtype)
        return self.o(out.transpose(0, 2, 1, 3).reshape(b, t, h * d))

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
        self.attention_norm = _norm(config, e, dtype)
        self.attention = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_norm = _norm(config, e, dtype) if post else None
        self.mlp_norm = _norm(config, e, dtype)
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)
        self.post_mlp_norm = _norm(config, e, dtype) if post else None

    def __call__(
        self, x: Array, positions: Array, spec: LayerSpec, attention: Attention
    ) -> Array:
        """The residual stream after this layer."""
        y = self.attention(self.attention_norm(x), positions, spec, attention)
        x = x + (y if self.post_attention_norm is None else self.post_attention_norm(y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y))


class Decoder(nnx.Module):
    """A causal language model without an opinion on attention.

    Args:
        config: static; `config.layers` says what each layer's attention is.
        dtype: of the parameters and of the matrix products.
        rngs: fresh weights; stream `params`.
    """

    def __init__(self, config: DecoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        noise = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param((noise * config.init_std).astype(dtype))
        self.layers = nnx.List(
            [Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = _norm(config, config.hidden_size, dtype)
        self.head = None if config.tie_embeddings else _head(config, dtype, rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the parameters, and of keys and values."""
        return self.embedding[...].dtype

    def embed(self, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape E"]:
        """Scaled embeddings; ids out of range read the nearest valid row."""
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attention: Attention,
        *,
        remat: bool = False,
        loop: bool = False,
        place: Callable[[Array], Array] = lambda x: x,
    ) -> Float[Array, "B T E"]:
        """Hidden states after the final norm.

        Args:
            tokens: right-padded token ids.
            positions: absolute positions, `EMPTY` at padding.
            attention: called once per layer in order, `LayerInputs -> [B H T D]`.
            remat: recompute each layer in the backward pass instead of storing it;
                `attention` must then be pure, or `Carrying` all that it keeps.
            loop: compile layers that compute the same once, see `walk`; the same holds
                for `attention`.
            place: where the residual stream is to be, over several devices; called
                with it in front of every layer.
        """
        x = self.embed(tokens)
        carrying = attention if isinstance(attention, Carrying) else None

        def step(layer: Layer, spec: LayerSpec, x: Array, state: Any):
            x = place(x)
            if carrying is None:
                return layer(x, positions, spec, attention), None
            carrying.state = state  # in and out by name, or a trace would leak it
            x = layer(x, positions, spec, attention)
            carrying.leave(x)
            return x, carrying.state

        state = carrying.state if carrying else None
        specs = self.config.layers
        x, state = walk(self.layers, specs, step, x, state, remat=remat, loop=loop)
        if carrying is not None:
            carrying.state = state
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*shape E"]) -> Float[Array, "*shape V"]:
        """Next-token logits in float32."""
        if self.head is None:
            rows, contract = self.embedding[...], 1
        else:
            rows, contract = self.head.kernel[...], 0
        hidden = hidden.astype(rows.dtype)
        out = _product(hidden, rows, contract=contract, dtype=jnp.float32)
        cap = self.config.final_softcap
        return out if cap is None else cap * jnp.tanh(out / cap)


def _norm(config: DecoderConfig, size: int, dtype) -> RMSNorm:
    return RMSNorm(size, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)


def _head(config: DecoderConfig, dtype, rngs: nnx.Rngs) -> Linear:
    e, v, std = config.hidden_size, config.vocab_size, config.init_std
    return Linear(e, v, bias=False, std=std, dtype=dtype, rngs=rngs)


def _product(x: Array, kernel: Array, *, contract: int, dtype=None) -> Array:
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
