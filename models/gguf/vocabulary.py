"""Tokenizers from the vocabulary of a GGUF file.

Byte-level BPE (`gpt2`) with its merges, and SentencePiece BPE (`llama`), whose merges
follow from its scores. What a file says of a tokenizer is all that is used.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvjax.messages import nearest, shown
from kvjax.models.gguf.metadata import Metadata
from kvjax.models.gguf.pieces import merges_by_score, merges_of
from kvjax.models.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from kvjax.models.gguf.walk import Array
from kvjax.models.tokenizer import named

_KINDS = ("gpt2", "llama")
NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = range(1, 7)
_SPECIAL = ("bos", "eos", "unknown", "padding")
_SPACE = "▁"
_CANNOT = "{}: its tokenizer cannot be built"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The pieces of a file, checked.

    Attributes:
        tokens: by id.
        types: of each.
        special: ids of bos, eos, unknown, padding; None where there is none.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    special: dict[str, int | None]

    def of(self, *types: int) -> list[int]:
        """Ids of the pieces of some types."""
        return [at for at, kind in enumerate(self.types) if kind in types]

    def token(self, name: str) -> str | None:
        """A special token's text."""
        at = self.special[name]
        return None if at is None else self.tokens[at]


def tokenizer_of(about: Metadata) -> Any:
    """The file's tokenizer, as transformers has them.

    Raises:
        ValueError: it has none, one of another kind, or what it says of it is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    place = about.header.path
    kind = about.get("tokenizer.ggml.model", str, None)
    if kind is None:
        raise ValueError(
            f"{place} has no tokenizer. Pass `tokenizer=False` to load the weights "
            "alone."
        )
    if kind not in _KINDS:
        raise ValueError(
            f"{place}: `tokenizer.ggml.model` is {shown(kind)}, which is not read; "
            f"expected one of {list(_KINDS)}.{nearest(kind, _KINDS)} Pass "
            "`tokenizer=False` to load the weights alone."
        )
    words = _vocabulary(about)
    template = about.get("tokenizer.chat_template", str, None)
    made = _byte_level(about, words) if kind == "gpt2" else _pieces(about, words)
    with named(_CANNOT.format(place)):
        _add(made, words)
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        given = {n: words.token(s) for n, s in zip(names, _SPECIAL, strict=True)}
        out = PreTrainedTokenizerFast(
            tokenizer_object=made,
            clean_up_tokenization_spaces=False,
            **{name: token for name, token in given.items() if token is not None},
        )
    if template:
        out.chat_template = template
    out.name_or_path = str(place)
    return out


def _vocabulary(about: Metadata) -> Vocabulary:
    header, name = about.header, "tokenizer.ggml.tokens"
    tokens = header.items(name)
    if not tokens or not all(isinstance(one, str) for one in tokens):
        raise ValueError(f"{header.path}: `{name}` must be texts, one at least.")
    if len({*tokens}) != len(tokens):
        seen: set[str] = set()
        twice = next(one for one in tokens if one in seen or seen.add(one))
        raise ValueError(
            f"{header.path}: `{name}` holds {twice[:80]!r} twice. The file is damaged."
        )
    types = _numbers(about, "token_type", len(tokens), int) or [NORMAL] * len(tokens)
    special = {kind: about.token(kind, len(tokens)) for kind in _SPECIAL}
    return Vocabulary(tokens=tokens, types=types, special=special)


def _numbers(about: Metadata, short: str, count: int, kind: type) -> list[Any] | None:
    """An array beside the tokens, with a number for each; None where it is not."""
    header, name = about.header, f"tokenizer.ggml.{short}"
    if name not in header.metadata:
        return None
    array = header.metadata[name]
    same = isinstance(array, Array) and array.count == count
    found = header.items(name) if same else []
    fine = len(found) == count and all(type(x) is kind and x == x for x in found)
    if not fine:  # x == x: no NaN
        raise ValueError(
            f"{header.path}: `{name}` must be {count} numbers, one for each token; got "
            f"{shown(found or array)}."
        )
    return found


def _byte_level(about: Metadata, words: Vocabulary) -> Any:
    """Byte-level BPE with the file's own merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    how = _pre_tokenizer(about)
    vocab = {token: at for at, token in enumerate(words.tokens)}
    merges = merges_of(about.header, vocab)
    with named(_CANNOT.format(about.header.path)):
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=how.ignore_merges)
    made = Tokenizer(model)
    if how.compose:
        made.normalizer = normalizers.NFC()
    prefix = about.get("tokenizer.ggml.add_space_prefix", bool, False)
    made.pre_tokenizer = how.build(prefix)
    made.decoder = decoders.ByteLevel()
    made.post_processor = _ends(about, words, how.bos) or processors.ByteLevel(
        trim_offsets=False
    )
    return made


def _pre_tokenizer(about: Metadata) -> PreTokenizer:
    name, place = "tokenizer.ggml.pre", about.header.path
    pre = about.get(name, str, None)
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{place}: `{name}` is {shown(pre)}, a way to split texts that is not "
            f"known here; expected one of {sorted(PRE_TOKENIZERS)}."
            f"{nearest(pre, PRE_TOKENIZERS)} Pass `tokenizer=False`, and take the "
            "tokenizer of the model in Hugging Face layout."
        )
    return PRE_TOKENIZERS[pre]


def _pieces(about: Metadata, words: Vocabulary) -> Any:
    """SentencePiece BPE: spaces are a character, and what is no piece becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _scores(about, len(words.tokens))
    vocab = {token: at for at, token in enumerate(words.tokens)}
    plain = {words.tokens[at]: scores[at] for at in words.of(NORMAL)}
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    unknown = words.token("unknown")
    if unknown is None and (found := words.of(UNKNOWN)):
        unknown = words.tokens[found[0]]
    merges = merges_by_score(plain, vocab)
    whole = all(one in vocab for one in bytes_)
    options: Any = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": whole}
    with named(_CANNOT.format(about.header.path)):
        made = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    prefix = about.get("tokenizer.ggml.add_space_prefix", bool, True)
    replaced = normalizers.Replace(" ", _SPACE)
    front = [normalizers.Prepend(_SPACE)] if prefix else []
    made.normalizer = normalizers.Sequence([*front, replaced]) if front else replaced
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
    back.append(decoders.Fuse())
    made.decoder = decoders.Sequence(
        back + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    if (ends := _ends(about, words, True)) is not None:
        made.post_processor = ends
    return made


def _scores(about: Metadata, count: int) -> list[float]:
    """Of pieces, from which their merges follow.

    Raises:
        ValueError: there are none, or texts are changed in ways that are not done here.
    """
    header = about.header
    pre = about.get("tokenizer.ggml.pre", str, "default")
    if pre != "default":
        raise ValueError(
            f"{header.path}: `tokenizer.ggml.pre` is {shown(pre)} for pieces of "
            "SentencePiece; expected 'default' or none."
        )
    if about.get("tokenizer.ggml.remove_extra_whitespaces", bool, False):
        raise ValueError(
            f"{header.path}: `tokenizer.ggml.remove_extra_whitespaces` is true, which "
            "is not done here. Pass `tokenizer=False`."
        )
    scores = _numbers(about, "scores", count, float)
    if scores is None:
        raise ValueError(
            f"{header.path} lacks `tokenizer.ggml.scores`, from which merges of "
            "SentencePiece follow. Convert it again."
        )
    return scores


def _ends(about: Metadata, words: Vocabulary, bos: bool) -> Any:
    """What puts the begin and end tokens around a text; None: nothing is put there."""
    from tokenizers import processors

    front = about.get("tokenizer.ggml.add_bos_token", bool, bos)
    behind = about.get("tokenizer.ggml.add_eos_token", bool, False)
    asked = [("bos", front), ("eos", behind)]
    for kind, wanted in asked:
        if wanted and words.special[kind] is None:
            raise ValueError(
                f"{about.header.path}: `tokenizer.ggml.add_{kind}_token` is true, and "
                f"there is no `tokenizer.ggml.{kind}_token_id`. Convert it again."
            )
    if not (front or behind):
        return None
    pair = [(words.token(kind), words.special[kind]) for kind, want in asked if want]
    left = f"{words.token('bos')}:0 " if front else ""
    right = f" {words.token('eos')}:0" if behind else ""
    second = f"{left}$B:0{right}".replace(":0", ":1")
    return processors.TemplateProcessing(
        single=f"{left}$A:0{right}",
        pair=f"{left}$A:0{right} {second}",
        special_tokens=pair,
    )


def _add(made: Any, words: Vocabulary) -> None:
    """Tokens that are looked for in the text itself; control tokens are special."""
    from tokenizers import AddedToken

    named_ids = {at for at in words.special.values() if at is not None}
    special = {*words.of(CONTROL, UNKNOWN), *named_ids}
    added = [
        AddedToken(words.tokens[at], normalized=False, special=at in special)
        for at in sorted({*special, *words.of(DEFINED)})
        if words.tokens[at]
    ]
    made.add_tokens([one for one in added if not one.special])
    made.add_special_tokens([one for one in added if one.special])
    for at in (*special, *words.of(DEFINED)):
        if words.tokens[at] and made.token_to_id(words.tokens[at]) != at:
            raise ValueError(
                f"token {words.tokens[at][:80]!r} has not kept its id {at}"
            )
