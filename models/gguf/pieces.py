"""Merges of BPE: those that stand in a file, and those that follow from scores."""

from collections.abc import Mapping

from kvjax.messages import shown
from kvjax.models.gguf.header import Header

_NAME = "tokenizer.ggml.merges"


def merges_of(header: Header, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of a file, all of whose parts and results are tokens.

    Raises:
        ValueError: there are none, or one is none; names its place.
    """
    if _NAME not in header.metadata:
        raise ValueError(
            f"{header.path} lacks `{_NAME}`, without which texts have no tokens. "
            "Convert it again with a current llama.cpp."
        )
    out = []
    for number, text in enumerate(header.items(_NAME)):
        # A part may begin with a space where a vocabulary is not of bytes.
        at = text.find(" ", 1) if isinstance(text, str) else -1
        pair = (text[:at], text[at + 1 :]) if at > 0 else ()
        if not pair or not all(one in vocab for one in (*pair, "".join(pair))):
            raise ValueError(
                f"{header.path}: entry {number} of `{_NAME}` is {shown(text)}; "
                "expected two tokens with a space between that together are a token."
            )
        out.append(pair)
    return out


def merges_by_score(
    scores: Mapping[str, float], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every two pieces that together are a piece, that of the highest score first.

    SentencePiece joins the neighbours whose result scores best. Of one score, longer
    first parts come first, as transformers' converters have them.
    """
    found = []
    for whole, score in scores.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in scores and right in scores:
                key = (-score, -len(left), -len(right), vocab[left], vocab[right])
                found.append((*key, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
