"""The character tokenizer, as transformers sees it and as training uses it."""

import string

import numpy as np
import pytest

from kvjax.train.data.tokenizer import (
    BOS,
    CHARACTERS,
    UNK,
    decode,
    encode,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 2048)
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def test_vocabulary_is_printable_ascii(tokenizer):
    assert len(tokenizer) == 100
    assert set(CHARACTERS) == set(string.printable) - set("\t\r\x0b\x0c")


def test_round_trip_is_exact(tokenizer):
    for text in (CHARACTERS, "two  spaces , and .\n\n? [KQ=ab3d]", " ", ""):
        ids = tokenizer.encode(text)
        assert ids == [BOS, *encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert decode(ids) == text


def test_other_characters_are_unknown_not_dropped(tokenizer):
    assert tokenizer.encode("é", add_special_tokens=False) == [UNK]


def test_batches_pad_on_the_right(tokenizer):
    out = tokenizer(["ab", "abcd"], padding=True, return_tensors="np")
    np.testing.assert_array_equal(out["attention_mask"][0], [1, 1, 1, 0, 0])
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2
