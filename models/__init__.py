"""Decoder, families, weights in and out, generation."""

from kvjax.attention import causal_attention as causal_attention
from kvjax.models.config import DecoderConfig as DecoderConfig
from kvjax.models.decoder import Decoder as Decoder
from kvjax.models.io import load as load
from kvjax.models.io import load_config as load_config
from kvjax.models.io import save as save
