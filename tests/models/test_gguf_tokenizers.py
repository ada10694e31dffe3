"""Tokenizers from the vocabulary of GGUF files, against the published ones."""

import gzip
import json
import pathlib
from typing import Any

import pytest

from kvjax.models.gguf import gguf_tokenizer
from kvjax.models.gguf.pretokenizers import PRE_TOKENIZERS
from kvjax.models.tokenizer import load_tokenizer, save_tokenizer
from tests.gguf_files import add
from tests.torch_env import find_torch_python, run_reference

gguf = pytest.importorskip("gguf", reason="no gguf: pip install kvjax[gguf]")

TEXTS = (
    "Hello World's don't 1234567 3.14 HTTPServer snake_case I'LL",
    "  two spaces\n\n\tif (a >= 10):\r\n    return  x ",
    "Ünïcödé naïve Здравствуй, мир! 你好世界 日本語 안녕 مرحبا हिन्दी 🙂 e\u0301",
    "",
    " ",
    "a/b//c --- ½ ² Ⅳ",
)


def vocabulary(path: pathlib.Path, **settings: Any) -> pathlib.Path:
    """A GGUF file with nothing but a tokenizer in it."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in settings.items():
        prefix = "" if "." in name else "tokenizer.ggml."
        add(writer, prefix + name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def texts_of(shared_data: pathlib.Path) -> list[str]:
    folder = shared_data / "lm"
    whole = [path.read_text("utf-8") for path in sorted(folder.glob("*/*.txt"))]
    return [*TEXTS, *(text[50_000:60_000] for text in whole)]


def round_trip(tokenizer: Any, folder: pathlib.Path, texts) -> None:
    """It is saved and loads again, and gives the same ids."""
    save_tokenizer(tokenizer, folder)
    again = load_tokenizer(folder)
    assert len(again) == len(tokenizer)
    for text in texts:
        assert again.encode(text) == tokenizer.encode(text)
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    for name in names:
        assert getattr(again, name) == getattr(tokenizer, name), name


@pytest.mark.parametrize(("name", "pre"), [("gpt2", "gpt-2"), ("qwen2", "qwen2")])
def test_byte_level_is_the_published_one(shared_data, tmp_path, name, pre):
    folder = tmp_path / name
    folder.mkdir()
    for path in (shared_data / "tokenizers" / name).glob("*.gz"):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    (folder / "config.json").write_text(json.dumps({"model_type": name}))
    reference = load_tokenizer(folder)
    table = json.loads((folder / "vocab.json").read_text("utf-8"))
    tokens = [*sorted(table, key=table.__getitem__)]
    merges = (folder / "merges.txt").read_text("utf-8").splitlines()
    merges = [line for line in merges if line and not line.startswith("#version")]
    end = "<|endoftext|>"
    tokens += [] if end in table else [end]
    types = [3 if token == end else 1 for token in tokens]
    path = vocabulary(
        tmp_path / "words.gguf",
        model="gpt2",
        pre=pre,
        tokens=tokens,
        token_type=types,
        merges=merges,
        eos_token_id=tokens.index(end),
        add_bos_token=False,
    )
    found = gguf_tokenizer(path)
    texts = [*texts_of(shared_data), f"one{end}two"]
    for text in texts:
        assert found.encode(text) == reference.encode(text), text[:80]
        assert name == "qwen2" or found.decode(found.encode(text)) == text
    round_trip(found, tmp_path / "again", texts)


def pieces_of(path: pathlib.Path) -> list[tuple[str, float, int]]:
    """Text, score and type of a SentencePiece model's pieces, out of protobuf."""
    import struct

    def fields(data: bytes):
        at = 0

        def varint() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value

        while at < len(data):
            tag = varint()
            if tag & 7 == 2:
                size = varint()
                yield tag >> 3, data[at : at + size]
                at += size
            elif tag & 7 == 5:
                yield tag >> 3, struct.unpack_from("<f", data, at)[0]
                at += 4
            else:
                yield tag >> 3, varint()

    out = []
    for number, value in fields(path.read_bytes()):
        if number == 1:
            assert isinstance(value, bytes)
            piece: dict[int, Any] = {2: 0.0, 3: 1} | dict(fields(value))
            out.append((piece[1].decode(), piece[2], piece[3]))
    return out


def test_sentencepiece_is_the_published_one(shared_data, tmp_path):
    python, reason = find_torch_python(("sentencepiece",))
    if python is None:
        pytest.skip(reason)
    (model,) = (shared_data / "tokenizers" / "mistral").glob("*.model.*")
    pieces = pieces_of(model)
    path = vocabulary(
        tmp_path / "words.gguf",
        model="llama",
        tokens=[text for text, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        token_type=[kind for _, _, kind in pieces],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    found = gguf_tokenizer(path)
    # Special tokens are looked for in texts, as transformers and llama.cpp do.
    texts = [text.replace("<unk>", "") for text in texts_of(shared_data)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    said = run_reference(
        "sentencepiece_reference.py",
        model,
        tmp_path / "texts.json",
        modules=("sentencepiece",),
    )
    for text, ids in zip(texts, json.loads(said), strict=True):
        if text:  # SentencePiece says nothing of an empty text
            assert found.encode(text) == [1, *ids], text[:80]
            assert found.decode(ids) == text
    round_trip(found, tmp_path / "again", texts)
    control = found.encode("[INST]")[-1]
    assert pieces[control][0] == "[INST]" and pieces[control][2] == 3


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
MORE = ["\n\n", "  ", "<b>", "▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "abc"]


def small_pieces(path: pathlib.Path, **settings: Any) -> Any:
    tokens = PIECES + MORE
    scores = [0.0] * 262 + [-float(n) for n in range(len(tokens) - 262)]
    given = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3, *[6] * 256, *[4] * 3, *[1] * (len(tokens) - 262)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return gguf_tokenizer(vocabulary(path, **(given | settings)))


def test_pieces_bytes_and_tokens_of_a_user(tmp_path):
    found = small_pieces(tmp_path / "words.gguf", add_space_prefix=False)
    id_of = {token: at for at, token in enumerate(PIECES + MORE)}

    def ids(*tokens: str) -> list[int]:
        return [1, *(id_of[token] for token in tokens)]

    # "▁a" is worth more than "ab", and that more than "bc".
    assert found.encode("abc") == ids("abc")
    assert found.encode("a abc") == ids("a", "▁a", "bc")
    assert found.encode("a\n\nb") == ids("a", "\n\n", "b")
    assert found.encode("a  <b>é") == ids("a", "  ", "<b>", "<0xC3>", "<0xA9>")
    text = "ab  <b>\n\né c"
    assert found.decode(found.encode(text), skip_special_tokens=True) == text
    assert found.decode(found.encode("a</s>"), skip_special_tokens=True) == "a"
    round_trip(found, tmp_path / "out", [text, *TEXTS])
    both = small_pieces(tmp_path / "words.gguf", add_eos_token=True)
    assert both.encode("ab") == [*ids("▁ab"), 2]
    assert both.decode(both.encode("ab"), skip_special_tokens=True) == "ab"


def small_bytes(path: pathlib.Path, **settings: Any) -> Any:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    given = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["<|end|>", "<tool>", *letters, "12", "ab", "Ġab", "AB"],
        "token_type": [3, 4, *[1] * 260],
        "merges": ["1 2", "a b", "Ġ ab", "A B"],
        "eos_token_id": 0,
    }
    return gguf_tokenizer(vocabulary(path, **(given | settings)))


def test_bytes_and_how_they_are_split(tmp_path):
    found = small_bytes(tmp_path / "words.gguf")
    assert found.convert_ids_to_tokens(found.encode("12 ab")) == ["1", "2", "Ġab"]
    assert len(found.encode("a<tool>b<|end|>")) == 4
    assert found.decode([1, 0], skip_special_tokens=True) == "<tool>"
    round_trip(found, tmp_path / "out", TEXTS)
    other = small_bytes(tmp_path / "words.gguf", pre="gpt-2")
    assert other.convert_ids_to_tokens(other.encode("12 ab")) == ["12", "Ġab"]
    ends = small_bytes(tmp_path / "words.gguf", add_eos_token=True, bos_token_id=1)
    assert ends.encode("ab")[-1] == 0 and ends.bos_token == "<tool>"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_way_to_split_gives_the_text_back(tmp_path, pre):
    import unicodedata

    found = small_bytes(tmp_path / "words.gguf", pre=pre, bos_token_id=0)
    for text in TEXTS:
        wanted = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        back = found.decode(found.encode(text), skip_special_tokens=True)
        assert back == wanted
    again = small_bytes(tmp_path / "words.gguf", pre=pre, add_bos_token=False)
    assert again.encode("ab")[0] != 0
    assert (found.encode("ab")[0] == 0) is PRE_TOKENIZERS[pre].bos


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_the_chat_template(tmp_path):
    said = {"tokenizer.chat_template": TEMPLATE}
    found = small_bytes(tmp_path / "words.gguf", **said)
    assert found.chat_template == TEMPLATE
    round_trip(found, tmp_path / "out", TEXTS)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model` is 'bert', which is not read; exp"),
        ({"model": None}, "has no tokenizer. Pass `tokenizer=False`"),
        ({"model": 3}, "`tokenizer.ggml.model` must be a text; got 3"),
        ({"pre": None}, "`tokenizer.ggml.pre` is None, a way to split.*'smollm'"),
        ({"pre": "smolm"}, "`tokenizer.ggml.pre` is 'smolm'.*Did you mean 'smollm'"),
        ({"pre": "default"}, "`tokenizer.ggml.pre` is 'default', a way to split"),
        ({"tokens": None}, "`tokenizer.ggml.tokens` must be an array; got None"),
        ({"tokens": [1, 2]}, "`tokenizer.ggml.tokens` must be texts"),
        ({"tokens": ["a", "a"]}, "`tokenizer.ggml.tokens` holds 'a' twice"),
        ({"token_type": [1, 2]}, "`tokenizer.ggml.token_type` must be 262 numbers"),
        ({"token_type": [0.5] * 262}, "`tokenizer.ggml.token_type` must be 262 numb"),
        ({"merges": None}, "lacks `tokenizer.ggml.merges`"),
        ({"merges": ["ab"]}, "entry 0 of `tokenizer.ggml.merges` is 'ab'; expected"),
        ({"merges": ["a b", "a z"]}, "entry 1 of `tokenizer.ggml.merges` is 'a z'"),
        ({"merges": [1, 2]}, "entry 0 of `tokenizer.ggml.merges` is 1; expected"),
        ({"eos_token_id": 262}, "`tokenizer.ggml.eos_token_id` is 262, which is no id"),
        ({"eos_token_id": "a"}, "`tokenizer.ggml.eos_token_id` is 'a', which is no id"),
        ({"add_bos_token": True}, "there is no `tokenizer.ggml.bos_token_id`"),
        ({"add_bos_token": 1}, "`tokenizer.ggml.add_bos_token` must be true or false"),
        ({"tokenizer.chat_template": 1.5}, "`tokenizer.chat_template` must be a text"),
    ],
)
def test_what_is_not_a_tokenizer(tmp_path, settings, match):
    with pytest.raises(ValueError, match=f"words.gguf.*{match}") as said:
        small_bytes(tmp_path / "words.gguf", **settings)
    assert len(str(said.value)) < 1200


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"scores": None}, "lacks `tokenizer.ggml.scores`"),
        ({"scores": [1.0]}, "`tokenizer.ggml.scores` must be 271 numbers"),
        ({"scores": [float("nan")] * 271}, "`tokenizer.ggml.scores` must be 271 num"),
        ({"pre": "llama-bpe"}, "`tokenizer.ggml.pre` is 'llama-bpe' for pieces"),
        ({"remove_extra_whitespaces": True}, "`tokenizer.ggml.remove_extra_whitesp"),
    ],
)
def test_what_are_no_pieces(tmp_path, settings, match):
    with pytest.raises(ValueError, match=f"words.gguf.*{match}"):
        small_pieces(tmp_path / "words.gguf", **settings)
