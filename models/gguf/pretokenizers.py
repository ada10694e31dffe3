"""How texts are split before byte-level BPE, by `tokenizer.ggml.pre`.

The expressions are those of the models' own `tokenizer.json`, which llama.cpp quotes
and approximates. Names whose published tokenizer was not at hand are not in the table:
another way to split gives other tokens without any error.

Source: llama.cpp `src/llama-vocab.cpp` (names, `ignore_merges`, `add_bos`).
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
)
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = rf"{_APOSTROPHE}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}"
_QWEN2 = rf"{_APOSTROPHE}|{_WORDS}|\p{{N}}|{_SIGNS}"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_SLASHES}"
_GPT4O = rf"{_CASED % (_APOSTROPHE + '?', _APOSTROPHE + '?')}|\p{{N}}{{1,3}}|{_SLASHES}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """A way to split.

    Attributes:
        expression: what stays together; empty: GPT-2's.
        digits: digits stand alone, before anything else is looked at.
        compose: characters are composed first (NFC).
        ignore_merges: what is a token as a whole is one, whatever the merges say.
        bos: a text begins with the begin token, where the file does not say.
    """

    expression: str = ""
    digits: bool = False
    compose: bool = False
    ignore_merges: bool = False
    bos: bool = False

    def build(self, prefix: bool) -> Any:
        """The splitting, of the `tokenizers` library; `prefix`: a space in front."""
        from tokenizers import Regex
        from tokenizers import pre_tokenizers as pre

        steps: list[Any] = [pre.Digits(individual_digits=True)] if self.digits else []
        if self.expression:
            steps.append(pre.Split(Regex(self.expression), "isolated"))
        plain = not self.expression
        steps.append(pre.ByteLevel(add_prefix_space=prefix, use_regex=plain))
        return pre.Sequence(steps) if len(steps) > 1 else steps[0]


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_TIKTOKEN = PreTokenizer(expression=_LLAMA3)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "dbrx": _TIKTOKEN,
        "gpt-2": _GPT2,
        "gpt-4o": PreTokenizer(expression=_GPT4O),
        "llama-bpe": PreTokenizer(expression=_LLAMA3, ignore_merges=True, bos=True),
        "phi-2": _GPT2,
        "qwen2": PreTokenizer(expression=_QWEN2, compose=True),
        "refact": _DIGITS,
        "smaug-bpe": _TIKTOKEN,
        "smollm": _DIGITS,
        "starcoder": _DIGITS,
        "tekken": PreTokenizer(expression=_TEKKEN, ignore_merges=True, bos=True),
    }
)
"""By name. `default` is none: it stands where the converter did not know either."""
