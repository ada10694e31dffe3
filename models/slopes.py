"""`gate_slopes`: what every token of a prompt does for what really comes after it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvjax.attention import self_attention
from kvjax.models import checks
from kvjax.models.decoder import Attending, Decoder
from kvjax.models.finite import check_rows
from kvjax.models.meshes import entry
from kvjax.pallas_kernels.held import Earlier
from kvjax.turns import take
from kvjax.types import EMPTY, LayerInputs, LengthsLike, TokensLike, padded_positions


@functools.partial(jax.jit, static_argnames=("graph",))
def _slopes(graph, params, tokens, lengths, prompt_lengths):
    model = nnx.merge(graph, params)
    (b, width), heads = tokens.shape, model.config.num_kv_heads
    positions = padded_positions(lengths, width)
    behind = padded_positions(prompt_lengths, width) == EMPTY
    later = behind & (positions >= 0)
    count = jnp.maximum(jnp.sum(later, axis=1), 1).astype(jnp.float32)

    def loss(soft: Array) -> tuple[Array, Array]:
        """Of all rows, and whether their logits are finite.

        `soft` is zeros, with the gradient of keeping a token.
        """

        def step(inputs: LayerInputs, state: None):
            kept = jnp.ones((b, heads, width), bool)
            mine = take(soft, inputs.depth.layer)
            earlier = Earlier(behind=behind, kept=kept, soft=mine)
            return self_attention(inputs, earlier=earlier)[0], state, ()

        asked = Attending(step=step)
        passed = model.run(tokens, positions, asked, trained=True, remat=True)
        logits = model.logits(passed.hidden[:, :-1])
        sound = jnp.isfinite(jnp.max(jax.lax.stop_gradient(logits), axis=-1))
        logs = jax.nn.log_softmax(logits, axis=-1)
        found = jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
        value = -jnp.sum(jnp.where(later[:, 1:], found, 0.0) / count[:, None])
        return value, jnp.all(sound | (positions[:, :-1] < 0), axis=1)

    zeros = jnp.zeros((model.config.num_layers, b, heads, width), jnp.float32)
    value, back, sound = jax.vjp(loss, zeros, has_aux=True)
    slopes = back(jnp.ones_like(value))[0]
    return slopes, sound & jnp.all(jnp.isfinite(slopes), axis=(0, 2, 3))


@entry
def gate_slopes(
    model: Decoder,
    tokens: TokensLike,
    lengths: LengthsLike | None,
    prompt_lengths: LengthsLike,
) -> Float[Array, "L B K S"]:
    """How the loss behind a prompt moves with the weight of each of its tokens.

    The loss is the mean negative log-likelihood of a row's tokens behind its prompt. A
    gate is a factor on the weight (before the softmax) that they give to one token of
    the prompt, in one KV head of one layer: 1 as it is, 0 dropped. This is the slope of
    the loss along each gate where all are 1: minus what dropping that token alone adds,
    to first order. The prompt itself sees all of its tokens.

    Args:
        model: a decoder.
        tokens: `[B, S]` right-padded sequences.
        lengths: `[B]` tokens per row; None: all of them.
        prompt_lengths: `[B]` tokens of the prompts, at least 1.

    Returns:
        `[L, B, K, S]` float32; 0 behind the prompts, and in rows that end with them.

    Raises:
        ValueError: see `simulate`.

    Cost: a pass over the rows forward and two backward; layers are made again on the
    way back, so that temporaries are linear in `S`. Logits of all tokens are held.
    """
    tokens, lengths = checks.asked(model, tokens, lengths)
    points = checks.prompt_lengths(prompt_lengths, lengths)
    graph, params = nnx.split(model)
    slopes, sound = _slopes(graph, params, tokens, lengths, points)
    check_rows(model.dtype, sound, " or their slopes")
    return slopes
