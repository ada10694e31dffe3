"""Tokenizers of a checkpoint directory, without torch and without remote code."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

from kvjax.files import read_json, read_text
from kvjax.messages import shown

LOG = logging.getLogger("kvjax.models")

TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates behind the first one."""
OWN_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of tokenizers by the names that transformers knows."""
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
    with _named(f"Cannot read the tokenizer in {directory} ({found})"):
        if "tokenizer.json" in found and "tokenizer_config.json" not in found:
            return _bare(directory)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )


def encoded(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text; `options` as `encode` of the tokenizer takes them.

    Raises:
        ValueError: the tokenizer fails, or gives what is no id of its vocabulary.
    """
    place = getattr(tokenizer, "name_or_path", None)
    which = f"The tokenizer in {shown(place)}" if place else "The tokenizer"
    with _named(f"{which} cannot encode {shown(text)}"):
        found = list(tokenizer.encode(text, **options))
        # A wrapper that only encodes is a tokenizer, too, and has no size.
        size = getattr(tokenizer, "__len__", lambda: 2**31)()
    for one in found:
        if not 0 <= one < size and not _is_token(tokenizer, one):
            raise ValueError(
                f"{which} gives token {one} for {shown(text)}, which is no id of its "
                f"{size} tokens. Mend its files, or take those of the model."
            )
    return found


def _is_token(tokenizer: Any, one: int) -> bool:
    """Of an id above the size of a vocabulary, which may have holes: it has a name."""
    inside = 0 <= one < 2**31  # as the model takes them
    return inside and tokenizer.convert_ids_to_tokens(one) is not None


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """While inside, what the Rust and Python layers of a tokenizer raise is worded."""
    try:
        yield
    except BaseException as error:
        # A panic of Rust is no `Exception`, and its class cannot be imported.
        panic = type(error).__name__ == "PanicException"
        if not panic and not isinstance(error, Exception):
            raise
        raise ValueError(f"{what}: {str(error):.500}") from error


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


def check_tokenizer(tokenizer: Any) -> None:
    """A tokenizer that can be saved, or None.

    Raises:
        ValueError: another object.
    """
    if tokenizer is not None and not callable(
        getattr(tokenizer, "save_pretrained", None)
    ):
        raise ValueError(
            "`tokenizer` must be a tokenizer, as `kvjax.load` returns it, or None; "
            f"got {shown(tokenizer)}."
        )


def check_kept(directory: pathlib.Path, vocab_size: int) -> None:
    """The tokenizer in a directory goes with a model that is to be saved there.

    Where the vocabulary stays as large as it was, it does.

    Raises:
        ValueError: it has more tokens than the model.
    """
    if not has_tokenizer(directory):
        return
    before, words = None, None
    with contextlib.suppress(ValueError):
        before = read_json(directory / "config.json").get("vocab_size")
    if before == vocab_size:
        return
    with contextlib.suppress(ValueError):  # whoever loads it will say so
        words = load_tokenizer(directory)
    size = 0 if words is None else len(words)
    if size > vocab_size:
        raise ValueError(
            f"{directory} has a tokenizer of {size} tokens, and the model to be saved "
            f"there knows {vocab_size}. Pass its own (`tokenizer=`), remove the one "
            "that is there, or save to another directory."
        )
    LOG.warning(
        "%s keeps its tokenizer of %d tokens, beside a model that knows %d; the one "
        "that was there knew %s. Pass the model's own (`tokenizer=`) to replace it.",
        directory,
        size,
        vocab_size,
        shown(before),
    )


def save_tokenizer(tokenizer: Any, directory: pathlib.Path) -> None:
    """The tokenizer's files."""
    tokenizer.save_pretrained(str(directory))
