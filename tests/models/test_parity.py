"""The decoder computes what transformers computes, for every family."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.models import Decoder, causal_attention, load, save
from kvjax.models.io import load_config
from kvjax.types import padded_positions

from .conftest import run_torch, story_directory

CASES = (
    "gemma3",
    "gemma3_pattern",
    "llama",
    "llama3",
    "llama_linear",
    "llama_yarn",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
)
STEPS = 32
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(reference) -> dict[str, Decoder]:
    return {
        case: load(reference.folder / case, "float32", tokenizer=False)[0]
        for case in CASES
    }


def all_logits(model: Decoder, tokens, lengths) -> np.ndarray:
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, tokens, lengths):
        model = nnx.merge(graphdef, params)
        positions = padded_positions(lengths, tokens.shape[1])
        return model.logits(model(tokens, positions, causal_attention))

    return np.asarray(run(params, jnp.asarray(tokens), jnp.asarray(lengths)))


def with_continuation(reference, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Each prompt and transformers' continuation of it, right-padded."""
    tokens, lengths = reference[f"{case}/tokens"], reference[f"{case}/lengths"]
    out = np.zeros((len(tokens), tokens.shape[1] + STEPS), np.int32)
    for row, length in enumerate(lengths):
        out[row, :length] = tokens[row, :length]
        out[row, length : length + STEPS] = reference[f"{case}/greedy"][row]
    return out, lengths + STEPS


@pytest.mark.parametrize("case", CASES)
def test_logits_match(reference, models, case):
    tokens, full = with_continuation(reference, case)
    logits = all_logits(models[case], tokens, full)
    lengths, expected = reference[f"{case}/lengths"], reference[f"{case}/logits"]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[row, :length], expected[row, :length], rtol=0, atol=TOLERANCE
        )
        # Fed its own continuation, the model chooses each next token of it: greedy
        # decoding from the prompt gives the same tokens, by induction.
        chosen = logits[row, length - 1 : length - 1 + STEPS].argmax(-1)
        np.testing.assert_array_equal(chosen, reference[f"{case}/greedy"][row])


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_match_through_the_cache(reference, models, case):
    tokens = jnp.asarray(reference[f"{case}/tokens"])
    lengths = jnp.asarray(reference[f"{case}/lengths"])
    # Parity is the matter here; promotion inside the caches has tests of its own.
    with jax.numpy_dtype_promotion("standard"):
        out = kvjax.generate(models[case], tokens, lengths, max_new_tokens=STEPS)
    np.testing.assert_array_equal(out.tokens, reference[f"{case}/greedy"])


def test_cases_cross_the_window(reference, models):
    for case in ("gemma3", "gemma3_pattern", "mistral", "phi3", "qwen2", "qwen3"):
        windows = {spec.window for spec in models[case].config.layers} - {None}
        assert windows == {8}
        assert min(reference[f"{case}/lengths"]) < 8 < max(reference[f"{case}/lengths"])


def test_round_trip_through_transformers(reference, models, tmp_path):
    for case in CASES:
        save(models[case], tmp_path / case)
        assert load_config(tmp_path / case) == models[case].config
    again = run_torch(tmp_path, "--run", *(tmp_path / case for case in CASES))
    for case in CASES:
        np.testing.assert_array_equal(
            again[f"{case}/logits"], reference[f"{case}/logits"], err_msg=case
        )


def test_round_trip_is_exact_in_bfloat16(reference, tmp_path):
    model, _ = load(reference.folder / "phi3", tokenizer=False)
    assert model.dtype == jnp.bfloat16
    save(model, tmp_path / "one")
    again, _ = load(tmp_path / "one", tokenizer=False)
    for a, b in zip(
        jax.tree.leaves(nnx.state(model)),
        jax.tree.leaves(nnx.state(again)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert json.loads((tmp_path / "one/config.json").read_text())["torch_dtype"] == (
        "bfloat16"
    )


def test_story_matches_token_by_token(reference):
    if "story" not in reference.arrays:
        pytest.skip("the trained model is not beside the checkout")
    model, tokenizer = load(story_directory(), "float32")
    story = reference["story"]
    prompt = tokenizer("Once upon a time, there was a little girl named Lily.")
    start = len(prompt["input_ids"])
    assert story[:start].tolist() == prompt["input_ids"]
    tokens = jnp.asarray([prompt["input_ids"]], jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        out = kvjax.generate(model, tokens, max_new_tokens=len(story) - start)
    np.testing.assert_array_equal(out.tokens[0], story[start:])
    assert "She loved to play outside" in tokenizer.decode(story)
