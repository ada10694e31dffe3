"""Decoder, families, weights in and out, generation."""

from kvjax.models.config import DecoderConfig as DecoderConfig
from kvjax.models.decoder import Decoder as Decoder
