"""KVzip scores and keeps what kvpress does, replays and all.

Needs an interpreter with kvpress, see `tests/torch_env.py`; skipped without one.
"""

import numpy as np
import pytest

import kvjax
from kvjax.models.prompts import read_prompt
from tests.torch_env import find_torch_python, run_reference

# Compared with another library's arithmetic, on scores that nearly tie: as it is used.
pytestmark = [pytest.mark.slow, pytest.mark.optimized]


def test_scores_and_kept_positions(tmp_path):
    python, reason = find_torch_python()
    if python is None:
        pytest.skip(reason)
    folder, path = tmp_path / "model", tmp_path / "kvzip.npz"
    run_reference("reference/kvpress_kvzip.py", path, folder)
    with np.load(path) as file:
        data = dict(file)
    model, _ = kvjax.load(folder, dtype="float32", tokenizer=False)
    ask = {"evict.score.chunk": 64, "evict.score.ask": data["ask"].tolist()}
    c = kvjax.compression("kvzip", **ask, **{"evict.budget.keep": 0.5})
    prompt = read_prompt(model, data["tokens"][None], None, c)
    (seen,) = prompt.seen
    assert seen.memory is not None
    n = len(data["tokens"])
    ours = np.asarray(seen.memory.slots)[:, 0, :, :n]
    np.testing.assert_allclose(ours, data["scores"], rtol=2e-4, atol=1e-6)
    cache = prompt.compress(c)
    for layer in range(model.config.num_layers):
        for head, kept in enumerate(cache.kept_positions(layer)[0]):
            theirs = data[f"kept/layer{layer}/head{head}"]
            np.testing.assert_array_equal(kept, theirs)
