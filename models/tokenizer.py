"""Tokenizers of a checkpoint directory, without torch and without remote code."""

import pathlib
from typing import Any

from kvjax.files import read_json, read_text

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def has_tokenizer(directory: pathlib.Path) -> bool:
    """Whether the directory holds files of a tokenizer."""
    return any((directory / name).is_file() for name in _FILES)


def load_tokenizer(directory: pathlib.Path) -> Any:
    """The directory's tokenizer, chat template included.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    found = [name for name in _FILES if (directory / name).is_file()]
    if not found:
        raise ValueError(
            f"{directory} has no tokenizer (none of {list(_FILES)}). Pass "
            f"`tokenizer=False` to load the weights alone."
        )
    try:
        if "tokenizer.json" in found and "tokenizer_config.json" not in found:
            return _bare(directory)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    # The reader below raises whatever its Rust and Python layers raise.
    except Exception as error:
        raise ValueError(
            f"Cannot read the tokenizer in {directory} ({found}): {str(error):.500}"
        ) from error


def _bare(directory: pathlib.Path) -> Any:
    """A lone `tokenizer.json`: special tokens come from `config.json`'s ids."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json")
    )
    config = directory / "config.json"
    ids = read_json(config) if config.is_file() else {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = ids.get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(value))
    template = directory / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = read_text(template)
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: pathlib.Path) -> None:
    """The tokenizer's files."""
    tokenizer.save_pretrained(str(directory))
