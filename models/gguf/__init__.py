"""GGUF files as checkpoints: config, weights and tokenizer out of one file."""

import pathlib
from typing import Any

from kvjax.models.config import DecoderConfig
from kvjax.models.families import read_config
from kvjax.models.gguf.config import as_config
from kvjax.models.gguf.header import is_gguf as is_gguf
from kvjax.models.gguf.header import read_header
from kvjax.models.gguf.metadata import Metadata
from kvjax.models.gguf.weights import Weights


def gguf_config(path: pathlib.Path) -> DecoderConfig:
    """`DecoderConfig` of a file; weights are not touched.

    Raises:
        ValueError: the file or a setting is wrong; names both.
    """
    raw = as_config(Metadata(read_header(path)))
    try:
        return read_config(raw)
    except ValueError as wrong:
        raise ValueError(f"{path}: {wrong}") from None


def gguf_weights(path: pathlib.Path) -> Weights:
    """The tensors of a file, by their names in Hugging Face checkpoints.

    Raises:
        ValueError: the file is damaged, or holds what is not read.
    """
    return Weights(read_header(path))


def gguf_tokenizer(path: pathlib.Path) -> Any:
    """The tokenizer of a file, built from its vocabulary.

    Raises:
        ValueError: there is none, or it is of a kind that is not known here.
    """
    from kvjax.models.gguf.vocabulary import tokenizer_of

    return tokenizer_of(Metadata(read_header(path)))
