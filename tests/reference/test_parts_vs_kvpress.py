"""The references of ThinK, KVzip and CaM do what kvpress does.

Needs an interpreter with kvpress, see `tests/torch_env.py`; skipped without one.
"""

import numpy as np
import pytest

from tests.reference import base, merging, probes, think
from tests.torch_env import find_torch_python, run_reference

pytestmark = pytest.mark.slow

N_LAYERS, SLOTS = 4, 150
RTOL, ATOL = 2e-4, 1e-6  # kvpress computes in float32


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, np.ndarray]:
    """The npz of `kvpress_parts.py`; its layout is documented there."""
    python, reason = find_torch_python()
    if python is None:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("kvpress") / "parts.npz"
    run_reference("reference/kvpress_parts.py", path)
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("ratio, window", [(0.3, 32), (0.5, 8), (0.75, 32)])
@pytest.mark.parametrize("length", [320, 20])
def test_think_zeroes_the_same_channels(data, length, ratio, window):
    for n in range(N_LAYERS):
        q, k = (data[f"think/{length}/layer{n}/{x}"] for x in "qk")
        places = np.arange(length)
        scores = think.think_channel_scores(
            q,
            k,
            positions=np.tile(places, (len(k), 1)),
            q_positions=places,
            window=window,
        )
        pruned = think.think_keys(k, think.think_kept_channels(scores, ratio))
        theirs = data[f"think/{length}/{ratio}-{window}/layer{n}/k"]
        np.testing.assert_array_equal(pruned, theirs)


def test_the_transformer_is_a_llama(data):
    stem = "llama/weights/"
    weights = {x.removeprefix(stem): y for x, y in data.items() if x.startswith(stem)}
    model = probes.Transformer(
        {name: np.asarray(x, np.float64) for name, x in weights.items()},
        np.asarray(data["llama/frequencies"], np.float64),
        float(data["llama/epsilon"]),
    )
    logits = model.forward(data["llama/tokens"])
    np.testing.assert_allclose(logits, data["llama/logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["plain", "prefix", "plus"])
def test_kvzip_scores(data, case):
    places = np.arange(SLOTS)
    chunks = []
    for i in range(3):
        stem = f"kvzip/{case}/chunk{i}"
        start, end = (int(data[f"{stem}/{x}"]) for x in ("start", "end"))
        rows = []
        for n in range(N_LAYERS):
            q, replay_k, h = (data[f"{stem}/layer{n}/{x}"] for x in "qkh")
            k, v, w_o = (data[f"kvzip/{case}/layer{n}/{x}"] for x in ("k", "v", "w_o"))
            extra = {}
            if case == "plus":
                extra["row_weights"] = 1 / np.linalg.norm(h, axis=-1)
                size = len(w_o) // len(v)
                out = np.stack([v[m // size] @ w_o[m] for m in range(len(w_o))])
                extra["column_weights"] = np.linalg.norm(out, axis=-1)
            rows.append(
                probes.kvzip_chunk_scores(
                    q,
                    k,
                    replay_k,
                    positions=np.tile(places, (len(k), 1)),
                    q_positions=SLOTS + np.arange(q.shape[1]),
                    start=start,
                    end=end,
                    **extra,
                )
            )
        chunks.append(rows)
    held = np.broadcast_to(places, np.array(chunks).shape[1:])
    scores = probes.kvzip_scores(np.array(chunks), held)
    theirs = data[f"kvzip/{case}/scores"]
    np.testing.assert_allclose(scores, theirs, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("case", ["all", "some"])
def test_cam_values(data, case):
    names = ("k", "v", "received", "scores", "out_k", "out_v")
    k, v, received, scores, out_k, out_v = (data[f"cam/{case}/{x}"] for x in names)
    names = ("budget", "merged", "target")
    budget, merged, target = (int(data[f"cam/{case}/{x}"]) for x in names)
    kept = base.kept_mask(base.kept(scores, target), k.shape[1])
    dropped = np.where(kept, -np.inf, scores)
    candidates = base.kept_mask(base.kept(dropped, merged), k.shape[1]) & ~kept
    values = merging.cam_values(
        v,
        received,
        kept,
        positions=np.tile(np.arange(k.shape[1]), (len(k), 1)),
        budget=budget,
        candidates=candidates,
    )
    for n in range(len(k)):
        np.testing.assert_array_equal(k[n][kept[n]], out_k[n])
        np.testing.assert_allclose(values[n][kept[n]], out_v[n], rtol=1e-4, atol=1e-5)
