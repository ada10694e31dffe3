"""A small model and its recipe, for tests of training."""

from flax import nnx
from jaxtyping import Array

from kvjax.attention import causal_attention
from kvjax.models import Decoder, DecoderConfig
from kvjax.models.decoder import Attending, Attention
from kvjax.rope import Rope
from kvjax.train.data import Mixture
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives.passes import pass_over
from kvjax.train.recipe import DataConfig, Source, Stage, TrainConfig

SHAPE = DecoderConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Rope(head_dim=16),
    tie_embeddings=True,
    init_std=0.2,
)
DATA = DataConfig(sources=(Source(task="recall"),), turns=2)
STAGES = (Stage(steps=3, lengths={96: 1.0}, tokens_per_step=288),)


def model_of(config: DecoderConfig = SHAPE) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0))


def recipe(**fields) -> TrainConfig:
    return TrainConfig(model=SHAPE, data=DATA, stages=STAGES, **fields)


def predictions(
    model: Decoder,
    batch: TokenBatch,
    attention: Attention | Attending = causal_attention,
) -> Array:
    """Logits of every token but the first."""
    hidden = pass_over(model, batch.tokens, attention).hidden
    return model.logits(hidden)[:, :-1]


def a_batch(visible: float = 0.5) -> TokenBatch:
    return Mixture(DATA, STAGES, 0, visible).batch(0)
