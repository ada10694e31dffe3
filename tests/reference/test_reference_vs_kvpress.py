"""The NumPy references keep what kvpress keeps, on every layer and head.

Needs an interpreter with kvpress, see `tests/torch_env.py`; skipped without one.
"""

import dataclasses

import numpy as np
import pytest

from tests import reference
from tests.torch_env import find_torch_python, kvpress_reference

pytestmark = pytest.mark.slow

N_LAYERS, KV_HEADS = 4, 4
PROMPTS = {"S320": 320, "S512": 512}
KEEPS = (0.25, 0.5, 0.75)
# kvpress scores in float32: two tokens this close may swap places at the edge.
SCORE_RTOL = 1e-5


@dataclasses.dataclass(frozen=True)
class Layer:
    """Inputs of one layer's scorer, and how many tokens each head keeps."""

    index: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    w_o: np.ndarray
    inv_freq: np.ndarray
    keep: float

    @property
    def n(self) -> int:
        """Tokens kept per head."""
        return int(self.k.shape[1] * self.keep)


@pytest.fixture(scope="session")
def kvpress_data(tmp_path_factory) -> dict[str, np.ndarray]:
    """The npz of `tests/kvpress_reference.py`; its layout is documented there."""
    python, reason = find_torch_python()
    if python is None:
        pytest.skip(reason)
    return kvpress_reference(tmp_path_factory.mktemp("kvpress"))[1]


def snapkv(layer: Layer, window: int = 64) -> np.ndarray:
    """SnapKV scores of the layer."""
    return reference.score_snapkv(layer.q, layer.k, layer.v, window=window)


def knorm(layer: Layer) -> np.ndarray:
    """Knorm scores of the layer."""
    return reference.score_knorm(layer.q, layer.k, layer.v)


def critical(layer: Layer, window: int) -> np.ndarray:
    """CriticalKV scores over SnapKV."""
    base = snapkv(layer, window)
    return reference.score_criticalkv(base, layer.v, layer.w_o, layer.n)


def expected(layer: Layer, **options) -> np.ndarray:
    """ExpectedAttention scores."""
    arguments = (layer.q, layer.k, layer.v)
    return reference.score_expected_attention(
        *arguments, inv_freq=layer.inv_freq, **options
    )


def plain(name: str):
    """The scorer of that name without options."""
    score = getattr(reference, f"score_{name}")
    return lambda layer: score(layer.q, layer.k, layer.v)


SCORES = {
    "streaming_llm": plain("streaming_llm"),
    "knorm": knorm,
    "keydiff": plain("keydiff"),
    "snapkv": snapkv,
    "snapkv_w8": lambda layer: snapkv(layer, 8),
    "tova": plain("tova"),
    "observed_attention": plain("observed_attention"),
    "expected_attention": expected,
    "expected_attention_mean": lambda layer: expected(
        layer, use_covariance=False, use_vnorm=False
    ),
    "pyramidkv": snapkv,
    "pyramidkv_w8": lambda layer: snapkv(layer, 8),
    "criticalkv_snapkv": lambda layer: critical(layer, 64),
    "criticalkv_snapkv_w8": lambda layer: critical(layer, 8),
    "lagkv": plain("lagkv"),
    "cur": plain("cur"),
}
POOLED = {
    "adakv_snapkv": lambda x: reference.adakv_kept(snapkv(x), x.n),
    "adakv_snapkv_w8": lambda x: reference.adakv_kept(snapkv(x, 8), x.n),
    "adakv_knorm": lambda x: reference.adakv_kept(knorm(x), x.n),
    "adakv_knorm_a80": lambda x: reference.adakv_kept(knorm(x), x.n, alpha=0.8),
    "chunkkv_knorm": lambda x: reference.chunkkv_kept(knorm(x), x.keep),
    "chunkkv_snapkv": lambda x: reference.chunkkv_kept(snapkv(x), x.keep),
    "chunkkv_snapkv_w8": lambda x: reference.chunkkv_kept(snapkv(x, 8), x.keep),
}
BUDGET_WINDOW = {"pyramidkv": 64, "pyramidkv_w8": 8}


def layers(data, prompt: str, keep: float):
    """The inputs of every layer."""
    for index in range(N_LAYERS):
        q, k, v = (data[f"{prompt}/layer{index}/{letter}"] for letter in "qkv")
        yield Layer(
            index=index,
            q=q,
            k=k,
            v=v,
            w_o=data[f"layer{index}/w_o"],
            inv_freq=data["inv_freq"],
            keep=keep,
        )


def theirs(data, prompt: str, case: str, layer: Layer) -> list[np.ndarray]:
    """What kvpress kept."""
    stem = f"{prompt}/kept/{case}/{layer.keep}/layer{layer.index}"
    return [data[f"{stem}/head{head}"] for head in range(KV_HEADS)]


def is_top(scores: np.ndarray, positions: np.ndarray) -> bool:
    """Whether `positions` are a best choice, up to ties and rounding."""
    chosen = np.zeros(len(scores), bool)
    chosen[positions] = True
    worst, best_left = scores[chosen].min(), scores[~chosen].max()
    return bool(worst >= best_left or np.isclose(worst, best_left, rtol=SCORE_RTOL))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", SCORES)
def test_top_scores(kvpress_data, case, prompt, keep):
    for layer in layers(kvpress_data, prompt, keep):
        scores = SCORES[case](layer)
        n = layer.n
        if case in BUDGET_WINDOW:
            window = BUDGET_WINDOW[case]
            n = reference.pyramidkv_layer_budgets(
                PROMPTS[prompt], keep, N_LAYERS, window=window
            )[layer.index]
        ours = reference.kept(scores, n)
        for head, positions in enumerate(theirs(kvpress_data, prompt, case, layer)):
            where = f"layer {layer.index}, head {head}"
            assert len(positions) == n, where
            if np.isinf(scores[head]).sum() > n:  # more protected than kept: any do
                assert np.isinf(scores[head, positions]).all(), where
            elif not np.array_equal(ours[head], positions):
                assert is_top(scores[head], positions), where


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", POOLED)
def test_shared_choices(kvpress_data, case, prompt, keep):
    for layer in layers(kvpress_data, prompt, keep):
        ours = POOLED[case](layer)
        for head, positions in enumerate(theirs(kvpress_data, prompt, case, layer)):
            where = f"layer {layer.index}, head {head}"
            np.testing.assert_array_equal(ours[head], positions, err_msg=where)
