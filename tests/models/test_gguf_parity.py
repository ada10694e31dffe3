"""Models in GGUF files compute what transformers computes with them."""

import dataclasses

import numpy as np
import pytest

from kvjax.models import DecoderConfig, load
from kvjax.models.tokenizer import load_tokenizer
from kvjax.rope import Rope
from tests.gguf_files import write_gguf
from tests.torch_env import find_torch_python, run_reference

from .conftest import run_torch
from .test_gguf import CASES, model_of
from .test_parity import TOLERANCE, all_logits

gguf = pytest.importorskip("gguf", reason="no gguf: pip install kvjax[gguf]")

# Of qwen3 and gemma3 its loader takes heads of 128 and 256 channels for granted, and of
# phi3 it does not read the window.
WIDTHS = {"llama": 16, "qwen2": 16, "qwen3": 128, "phi3": 16, "gemma3": 256}


def widened(case: str) -> DecoderConfig:
    width, theta = WIDTHS[case], 1e6 if case == "gemma3" else 1e4
    fields = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": width,
        "init_std": 0.2,
        "rope": Rope(head_dim=width, theta=theta),
    }
    if case == "gemma3":
        fields |= {"local_rope": Rope(head_dim=width), "embedding_scale": 8.0}
        fields |= {"attention_scale": width**-0.5}
    if case == "phi3":
        fields |= {"windows": ()}
    return dataclasses.replace(CASES[case], **fields)


PARITY = {case: widened(case) for case in WIDTHS}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files with matrices in 4 and 8 bits, and what transformers makes of them."""
    python, reason = find_torch_python(("torch", "transformers", "gguf"))
    if python is None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("gguf")
    kinds = gguf.GGMLQuantizationType

    def kind(name: str):
        if "norm" in name or name.endswith(".bias"):
            return None
        return kinds.Q4_1 if "attn" in name else kinds.Q8_0

    said = {"tokenizer.ggml.padding_token_id": 0}  # its phi3 needs one
    paths = {
        name: write_gguf(folder / f"{name}.gguf", model_of(config), kind, said)
        for name, config in PARITY.items()
    }
    out = folder / "out.npz"
    modules = ("torch", "transformers", "gguf")
    run_reference("gguf_reference.py", out, *paths.values(), modules=modules)
    with np.load(out) as arrays:
        return paths, dict(arrays)


@pytest.mark.parametrize("case", PARITY)
def test_logits_match(files, case):
    paths, arrays = files
    model, _ = load(paths[case], "float32", tokenizer=False)
    tokens, wanted = arrays[f"{case}/tokens"], arrays[f"{case}/logits"]
    found = all_logits(model, tokens, np.asarray([tokens.shape[1]], np.int32))
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_a_published_model_token_by_token(torch_python, smollm2, tmp_path):
    """Fed transformers' story, it chooses each next token of it."""
    del torch_python
    story = run_torch(tmp_path, "--story", smollm2)["story"]
    model, tokenizer = load(smollm2, "float32")
    prompt = tokenizer("Once upon a time, there was a little girl named Lily.")
    start = len(prompt["input_ids"])
    assert story[:start].tolist() == prompt["input_ids"]
    lengths = np.asarray([len(story)], np.int32)
    logits = all_logits(model, story[None].astype(np.int32), lengths)[0]
    np.testing.assert_array_equal(logits[start - 1 : -1].argmax(-1), story[start:])


def test_a_published_model_knows_its_chat(smollm2):
    """Its tokens are those that its authors document, and its turns end."""
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    text = "  multiple   spaces\n\n\tCafé déjà vu."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "Hi"}]
    written = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert written.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_end|>") == [2]
