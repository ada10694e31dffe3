"""Tokenizers of a checkpoint directory, without torch and without remote code."""

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvjax.files import read_json, read_text
from kvjax.messages import shown

LOG = logging.getLogger("kvjax.models")

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
    with named(f"Cannot read the tokenizer in {directory} ({found})"):
        return _loaded(directory, found)


def _loaded(directory: pathlib.Path, found: list[str]) -> Any:
    """As `tokenizer.json` has it, where it is there."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where: Any = {"local_files_only": True, "trust_remote_code": False}
    if "tokenizer.json" not in found:
        return AutoTokenizer.from_pretrained(str(directory), **where)
    if "tokenizer_config.json" not in found:
        return _bare(directory)
    settings = read_json(directory / "tokenizer_config.json")
    wanted = _probed(directory)
    if settings.get("tokenizer_class") is not None:
        named = AutoTokenizer.from_pretrained(str(directory), **where)
        if wanted is None or _ids(named.encode) == wanted:
            return named
    else:
        named = None  # another library would choose by the model, and split otherwise
    plain = PreTrainedTokenizerFast.from_pretrained(str(directory), **where)
    _fill(plain, directory, settings)
    if wanted is None or _ids(plain.encode) == wanted:
        if named is not None:
            LOG.warning(
                "%s/tokenizer_config.json names the class %s, which gives other ids "
                "than tokenizer.json beside it. That of tokenizer.json is used; name "
                "PreTrainedTokenizerFast there if it is right.",
                directory,
                shown(settings["tokenizer_class"]),
            )
        return plain
    LOG.warning(
        "%s/tokenizer_config.json changes the ids of tokenizer.json beside it, and is "
        "followed (`add_prefix_space`, say). Take that out if tokenizer.json is right.",
        directory,
    )
    return plain if named is None else named


_PROBES = (
    "Hello World's don't 1234567 3.14 HTTPServer snake_case",
    "  two spaces\n\n\tif (a >= 10):\r\n    return  x ",
    "Ünïcödé naïve Здравствуй, мир! 你好世界 日本語 안녕 مرحبا हिन्दी 🙂 e\u0301",
)
"""Texts on which tokenizers differ: digits, spaces, lines, scripts, marks."""


def _probed(directory: pathlib.Path) -> list[list[int]] | None:
    """What `tokenizer.json` makes of the probes; None: it fails on them."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.no_truncation()
    raw.no_padding()
    return _ids(lambda text, **options: raw.encode(text, **options).ids)


def _ids(encode: Callable[..., Any]) -> list[list[int]] | None:
    with contextlib.suppress(ValueError), named("probes"):
        return [list(encode(text, add_special_tokens=False)) for text in _PROBES]
    return None


def encoded(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text; `options` as `encode` of the tokenizer takes them.

    Raises:
        ValueError: the tokenizer fails, or gives what is no id of its vocabulary.
    """
    place = getattr(tokenizer, "name_or_path", None)
    which = f"The tokenizer in {shown(place)}" if place else "The tokenizer"
    with named(f"{which} cannot encode {shown(text)}"):
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
def named(what: str) -> Iterator[None]:
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
    _fill(tokenizer, directory, {})
    template = directory / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = read_text(template)
    return tokenizer


def _fill(tokenizer: Any, directory: pathlib.Path, said: Mapping[str, Any]) -> None:
    """Special tokens that the tokenizer's files do not name, by `config.json`."""
    config = directory / "config.json"
    ids = read_json(config) if config.is_file() else {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = ids.get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        if name in said or getattr(tokenizer, name) is not None:
            continue
        if isinstance(value, int) and 0 <= value < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(value))


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
