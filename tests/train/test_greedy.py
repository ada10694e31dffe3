"""Greedy replies from drafts equal greedy decoding token by token."""

import jax.numpy as jnp
import pytest
from flax import nnx

from kvjax.attention import causal_attention
from kvjax.eval.tasks import STOP, make_task
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.rope import Rope
from kvjax.train.data.tokenizer import BOS, decode, encode
from tests.train.greedy import replies

CONFIG = DecoderConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rope=Rope(head_dim=8),
    tie_embeddings=True,
    init_std=0.5,
)


def one_by_one(model, prompt: str, most: int) -> str:
    tokens, out = [BOS, *encode(prompt)], []
    while len(out) < most and STOP not in decode(out):
        ids = jnp.array([tokens])
        hidden = model(ids, jnp.arange(len(tokens))[None], causal_attention)
        out.append(int(model.logits(hidden)[0, -1].argmax()))
        tokens.append(out[-1])
    return decode(out)


@pytest.mark.sweep(0, 2)
@pytest.mark.parametrize("seed", [0, 1])
def test_drafts_give_the_greedy_reply(seed):
    model = Decoder(CONFIG, rngs=nnx.Rngs(seed))
    items = make_task("recall", value_length=4).generate(0, 3, 100)
    got = replies(model, items, 6)
    assert got == [one_by_one(model, item.prompt, 6) for item in items]
