"""A small decoder, its like in NumPy, and prompts that it reads twice."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kvjax
from kvjax.attention import causal_attention
from kvjax.compress.survey import plans_of
from kvjax.depth import in_order
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.decoder import Attending
from kvjax.models.prompts import read_prompt
from kvjax.rope import Rope
from kvjax.scorers._replay import AbstractReplay
from kvjax.scorers.base import AbstractProbe
from kvjax.types import loops_of
from tests.reference import probes

V, LAYERS, KV_HEADS = 23, 2, 2
LENGTHS = np.array([21, 13, 5], np.int32)
"""The last row is no longer than most chunks, and than few replays lead in."""


@functools.lru_cache
def model_of(std: float = 0.2, **fields: Any) -> Decoder:
    """A small decoder with grouped queries and norms that are not ones."""
    config = DecoderConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=32,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=KV_HEADS,
        head_dim=8,
        rope=Rope(head_dim=8),
        max_positions=128,
        init_std=std,
        **fields,
    )
    model, rng = Decoder(config, rngs=nnx.Rngs(0)), np.random.default_rng(1)
    for norm in (model.norm, model.layers.attention_norm, model.layers.mlp_norm):
        weight = norm.weight
        weight[...] = jnp.asarray(rng.uniform(0.5, 1.5, weight.shape), jnp.float32)
    return model


@functools.lru_cache
def prompts() -> np.ndarray:
    """Ragged prompts; padding holds tokens that nobody may read."""
    return np.random.default_rng(0).integers(0, V, (3, 21)).astype(np.int32)


def method(score: AbstractProbe) -> kvjax.Compression:
    return kvjax.compression(
        "knorm", **{"evict.score": score, "evict.budget.keep": 1.0}
    )


def found(model: Decoder, score: AbstractProbe) -> np.ndarray:
    """Scores `[L, B, K, S]` of the ragged prompts."""
    c = method(score)
    seen = read_prompt(model, prompts(), LENGTHS, c).seen
    loops = loops_of(model.config.layers, plans_of(c, model.config.layers, 32))
    memories = [layer.memory for layer in seen]
    return np.asarray(in_order(loops, [m.slots for m in memories if m is not None]))


def replays(
    score: AbstractReplay, row: int
) -> Iterator[tuple[int, int, list[int], int]]:
    """`(start, end, tokens, first)`: the chunks of a row; `first` token of its own."""
    prompt = prompts()[row, : LENGTHS[row]].tolist()
    for start in range(0, len(prompt), score.chunk):
        end = min(start + score.chunk, len(prompt))
        before = max(start - min(score.overlap, score.chunk), 0)
        lead = [*score.ask, *prompt[before:start]]
        yield start, end, lead + prompt[start:end], len(lead)


def queries_and_keys(model: Decoder, tokens: list[int]) -> list[Any]:
    """`q [H, T, D]` and `k [K, T, D]` of every layer, of a plain pass."""
    width = 64
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    graph, params = nnx.split(model)
    layers = _plain_pass(graph, params, padded)
    return [[np.asarray(x, np.float64)[0] for x in layer] for layer in layers]


@functools.partial(jax.jit, static_argnums=0)
def _plain_pass(graph, params, tokens):
    model = nnx.merge(graph, params)

    def step(inputs, state):
        return causal_attention(inputs), state, (inputs.q, inputs.k)

    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    asked = Attending(step=step)
    left = model.run(tokens, places, asked, unroll=True).left
    layers = in_order(loops_of(model.config.layers), left)
    return [jax.tree.map(lambda x, n=n: x[n], layers) for n in range(LAYERS)]


FAMILIES = {"plain": {}, "windows": {"windows": (10, None), "attention_softcap": 2.0}}


def transformer(model: Decoder) -> probes.Transformer:
    """The same decoder in NumPy."""
    config, layers = model.config, model.layers
    e, d = config.hidden_size, config.head_dim
    named = {
        "attn_norm": (layers.attention_norm.weight, (e,)),
        "mlp_norm": (layers.mlp_norm.weight, (e,)),
        "q": (layers.attention.q.kernel, (e, config.num_heads, d)),
        "k": (layers.attention.k.kernel, (e, config.num_kv_heads, d)),
        "v": (layers.attention.v.kernel, (e, config.num_kv_heads, d)),
        "o": (layers.attention.o.kernel, (config.num_heads, d, e)),
        "gate": (layers.mlp.gate.kernel, (e, config.intermediate_size)),
        "up": (layers.mlp.up.kernel, (e, config.intermediate_size)),
        "down": (layers.mlp.down.kernel, (config.intermediate_size, e)),
    }
    weights = {
        f"{n}/{name}": np.asarray(stack[...][n], np.float64).reshape(shape)
        for name, (stack, shape) in named.items()
        for n in range(config.num_layers)
    }
    assert model.head is not None
    ends = {
        "embed": model.embedding,
        "norm": model.norm.weight,
        "head": model.head.kernel,
    }
    weights |= {name: np.asarray(x[...], np.float64) for name, x in ends.items()}
    return probes.Transformer(weights, config.rope.frequencies(), config.norm_eps)
