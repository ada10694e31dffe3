"""The presets keep what kvpress keeps, and answer as it does, on every layer and head.

Needs an interpreter with kvpress, see `tests/torch_env.py`; skipped without one.
"""

import functools

import numpy as np
import pytest

import kvjax
from kvjax.compress.config import Compression
from kvjax.models.prompts import read_prompt
from tests.torch_env import find_torch_python, kvpress_reference

# Compared with another library's arithmetic, on scores that nearly tie: as it is used.
pytestmark = [pytest.mark.slow, pytest.mark.optimized]

PROMPTS = ("S320", "S512")
LENGTHS = np.array([320, 512], np.int32)
KEEPS = (0.25, 0.5, 0.75)
LOGITS_ATOL = 2e-4
TIE = 1e-5
"""Scores this close, relatively, tie: those of deeper layers are rounded by more."""
KNORM = {"evict.score": {"type": "knorm"}}
PRESETS: dict[str, tuple[str, dict]] = {
    "streaming_llm": ("streaming_llm", {}),
    "knorm": ("knorm", {}),
    "keydiff": ("keydiff", {}),
    "snapkv": ("snapkv", {}),
    "snapkv_w8": ("snapkv", {"evict.score.window": 8}),
    "tova": ("tova", {}),
    "observed_attention": ("h2o", {}),
    "expected_attention": ("expected_attention", {}),
    "expected_attention_mean": (
        "expected_attention",
        {"evict.score.use_covariance": False, "evict.score.use_vnorm": False},
    ),
    "pyramidkv": ("pyramidkv", {}),
    "pyramidkv_w8": (
        "pyramidkv",
        {"evict.score.window": 8, "evict.budget.window": 8},
    ),
    "adakv_snapkv": ("adakv_snapkv", {}),
    "adakv_snapkv_w8": ("adakv_snapkv", {"evict.score.window": 8}),
    "adakv_knorm": ("adakv_snapkv", KNORM),
    "adakv_knorm_a80": ("adakv_snapkv", KNORM | {"evict.budget.safeguard": 0.8}),
    "chunkkv_knorm": ("chunkkv_kvpress", KNORM),
    "chunkkv_snapkv": ("chunkkv_kvpress", {}),
    "chunkkv_snapkv_w8": ("chunkkv_kvpress", {"evict.score.window": 8}),
    "criticalkv_snapkv": ("criticalkv_snapkv", {}),
    "criticalkv_snapkv_w8": ("criticalkv_snapkv", {"evict.score.base.window": 8}),
    "lagkv": ("lagkv", {}),
    "cur": ("cur", {}),
}
"""Preset and overrides that follow each case of `kvpress_reference.py`."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The model in float32, and what kvpress did with it."""
    python, reason = find_torch_python()
    if python is None:
        pytest.skip(reason)
    folder, data = kvpress_reference(tmp_path_factory.mktemp("presets"))
    model, _ = kvjax.load(folder, dtype="float32", tokenizer=False)
    return model, data


@functools.cache
def method(case: str) -> Compression:
    """The preset of a case."""
    name, overrides = PRESETS[case]
    return kvjax.compression(name, **overrides)


def tokens_of(data) -> np.ndarray:
    """Both prompts, right-padded."""
    tokens = np.zeros((len(PROMPTS), LENGTHS.max()), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : LENGTHS[row]] = data[f"{prompt}/tokens"]
    return tokens


def following(data) -> np.ndarray:
    """The token that kvpress fed after each prompt, `[B, 1]`."""
    return np.array([[data[f"{prompt}/next_token"]] for prompt in PROMPTS], np.int32)


def theirs(data, prompt: str, case: str, keep: float, layer: int) -> list[np.ndarray]:
    """What kvpress kept in each head of a layer."""
    stem = f"{prompt}/kept/{case}/{keep}/layer{layer}/head"
    heads = sum(key.startswith(stem) for key in data)
    return [data[f"{stem}{head}"] for head in range(heads)]


def same_but_for_ties(ours: list[np.ndarray], others: list[np.ndarray], scores) -> bool:
    """Whether a layer's kept tokens are equal; raises where no tie explains it.

    Args:
        ours: kept positions by head.
        others: kvpress's.
        scores: `[K, S]`, by which kvpress chose; None where it chose chunks.
    """
    pooled: list[tuple[int, int]] = []  # heads that share a budget may trade tokens
    swapped = []
    for head, (mine, other) in enumerate(zip(ours, others, strict=True)):
        parted = [(head, int(at)) for at in np.setxor1d(mine, other)]
        if len(mine) == len(other):
            swapped.append(parted)
        else:
            pooled += parted
    assert sum(map(len, ours)) == sum(map(len, others))
    swapped = [one for one in (*swapped, pooled) if one]
    for one in swapped:
        assert scores is not None, one
        each = np.array([scores[at] for at in one])
        assert np.ptp(each) <= TIE * np.abs(each).max(), (one, each)
    return not swapped


def any_protected_stays(case: str, keep: float, length: int) -> bool:
    """LagKV below its protected tokens: kvpress keeps any of them, we the newest."""
    sinks, lag = 4, 128
    blocks = (length - sinks) // lag
    protected = length - (blocks - 1) * lag
    return case == "lagkv" and protected > int(length * keep)


def check_lagkv(ours: np.ndarray, other: np.ndarray, length: int) -> None:
    """Sinks and the newest tokens; kvpress keeps as many, all protected."""
    assert len(ours) == len(other)
    want = np.r_[0:4, length - (len(other) - 4) : length]
    np.testing.assert_array_equal(ours, want)
    first = 4 + ((length - 4) // 128 - 1) * 128
    assert ((other < 4) | (other >= first)).all()


def test_a_token_is_exchanged_only_for_one_that_ties():
    scores = np.array([[1, 2, 3, 3.00001], [5, 6, 7, 8]])
    kept = [np.array([1, 2]), np.array([2, 3])]
    assert same_but_for_ties(kept, kept, scores)
    tied = [np.array([1, 3]), kept[1]]
    assert not same_but_for_ties(kept, tied, scores)
    for others, by in (
        ([np.array([0, 3]), kept[1]], scores),
        ([np.array([1]), kept[1]], scores),
        ([np.array([1]), np.array([1, 2, 3])], scores),
        (tied, None),
    ):
        with pytest.raises(AssertionError):
            same_but_for_ties(kept, others, by)


def test_every_case_is_covered(run):
    cases = {key.split("/")[2] for key in run[1] if "/kept/" in key}
    assert cases == set(PRESETS)


def test_uncompressed_logits(run):
    model, data = run
    logits, cache = kvjax.prefill(model, tokens_of(data), LENGTHS)
    after, _ = kvjax.extend(model, cache, following(data))
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(
            logits[row], data[f"{prompt}/logits"], atol=LOGITS_ATOL
        )
        want = data[f"{prompt}/next_logits/full/1.0"]
        np.testing.assert_allclose(after[row, 0], want, atol=LOGITS_ATOL)


@functools.cache
def read_prompts(model, case: str, tokens: bytes):
    """One pass over the prompts, for all budgets of a case."""
    ids = np.frombuffer(tokens, np.int32).reshape(len(PROMPTS), -1)
    return read_prompt(model, ids, LENGTHS, method(case))


@pytest.mark.sweep(0, 12)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("case", PRESETS)
def test_kept_positions_and_next_logits(run, case, keep):
    model, data = run
    c = method(case).with_keep(keep)
    if keep == KEEPS[0]:
        _, cache = kvjax.prefill(model, tokens_of(data), LENGTHS, c, max_new_tokens=4)
    else:  # the same cache, from one pass over the prompts for all budgets
        prompt = read_prompts(model, case, tokens_of(data).tobytes())
        cache = prompt.compress(c, max_new_tokens=4)
    equal = np.ones(len(PROMPTS), bool)
    for layer in range(len(cache.layers)):
        kept = cache.kept_positions(layer)
        for row, prompt in enumerate(PROMPTS):
            length = int(LENGTHS[row])
            others = theirs(data, prompt, case, keep, layer)
            if any_protected_stays(case, keep, length):
                equal[row] = False
                for ours, other in zip(kept[row], others, strict=True):
                    check_lagkv(ours, other, length)
                continue
            scores = data.get(f"{prompt}/scores/{case}/{keep}/layer{layer}")
            equal[row] &= same_but_for_ties(kept[row], others, scores)
    after, _ = kvjax.extend(model, cache, following(data))
    for row, prompt in enumerate(PROMPTS):
        if not equal[row]:  # other tokens, other logits
            continue
        want = data[f"{prompt}/next_logits/{case}/{keep}"]
        np.testing.assert_allclose(after[row, 0], want, atol=LOGITS_ATOL)
