"""Tokens as text: characters over several tokens, spaces that decoders drop."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvjax.eval.pieces import token_pieces

TEXT = "Hello 你好 🙂 naïve\n\n  two <b>\t日本"


def bytewise() -> PreTrainedTokenizerFast:
    """A token per byte, as in GPT-2's vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def spaced() -> PreTrainedTokenizerFast:
    """Words with a mark for the space before them, as in Llama's vocabulary."""
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_a_character_stands_with_its_first_token():
    tokenizer = bytewise()
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == TEXT
    at = len(b"Hello ")
    assert pieces[at : at + 6] == ["你", "", "", "好", "", ""]


def test_spaces_between_words_stay():
    assert token_pieces(spaced(), [1, 2, 3, 1]) == ["the", " cat", "s", " the"]


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_half_a_character_is_shown_for_what_it_is(cut):
    tokenizer = bytewise()
    ids = tokenizer.encode("你" * 5)[cut:]
    pieces = token_pieces(tokenizer, ids[:-1])
    assert len(pieces) == len(ids) - 1
    assert "你" in "".join(pieces) and "\ufffd" in "".join(pieces)


def test_special_tokens_have_names():
    tokenizer = bytewise()
    ids = [*tokenizer.encode("a b"), tokenizer.eos_token_id]
    assert token_pieces(tokenizer, ids) == ["a", " ", "b", "<|end|>"]
    assert token_pieces(tokenizer, []) == []
