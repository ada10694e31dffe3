"""Perplexity and KL through the real cache, against the uncompressed one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.eval import harness
from kvjax.eval.fidelity import TextTask, compare, fidelity
from kvjax.eval.rows import read_rows
from kvjax.eval.text import Tokenizer
from tests.eval import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(3), (2, 48), 4, 100)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times.\n" * 12)
    return path


@pytest.mark.sweep(3, 5)
@pytest.mark.parametrize("calls", [1, 3, 15])
@pytest.mark.parametrize("name", ["none", "knorm"])
def test_keeping_everything_changes_nothing(model, tokens, name, calls):
    c = kvjax.compression(name)
    c = c.with_keep(1.0) if c.has_budget else c
    got = fidelity(model, tokens, 32, c, calls=calls)
    np.testing.assert_allclose(got.kl, 0, atol=1e-6)
    assert got.agreement.tolist() == [1.0, 1.0]
    logits, _ = kvjax.prefill(model, tokens[:, :34])
    first = -jax.nn.log_softmax(logits)[jnp.arange(2), tokens[:, 34]]
    alone = fidelity(model, tokens[:, :35], 32, c)  # predicts tokens 33 and 34
    last = fidelity(model, tokens[:, :35], 33, c)  # predicts token 34
    np.testing.assert_allclose(last.nll, first, rtol=1e-4)
    assert (alone.nll != last.nll).all()
    np.testing.assert_allclose(got.ppl, np.exp(got.nll))


def test_calls_do_not_matter_but_compression_does(model, tokens):
    c = kvjax.compression("knorm").with_keep(0.25)
    once = fidelity(model, tokens, 32, c)
    often = fidelity(model, tokens, 32, c, calls=5)
    np.testing.assert_allclose(once.nll, often.nll, rtol=1e-4)
    np.testing.assert_allclose(once.kl, often.kl, rtol=1e-3)
    assert (once.kl > 1e-4).all()
    full = fidelity(model, tokens, 32, kvjax.Compression())
    assert once.resident_bytes < full.resident_bytes


def test_compare_by_hand():
    full = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]))
    held = jnp.log(jnp.array([[[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]]))
    nll, kl, agreement = compare(full, held, jnp.array([[0, 1]]))
    np.testing.assert_allclose(nll, -(np.log(0.25) + np.log(0.8)) / 2, rtol=1e-6)
    np.testing.assert_allclose(kl, 0.25 * np.log(2.0) / 2, rtol=1e-5)
    assert agreement.tolist() == [0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 0}, "context"),
        ({"context": 47}, "continuation"),
        ({"calls": 16}, "15 tokens"),
        ({"calls": 1.5}, "`calls` must be an integer"),
        ({"context": None}, "`context` must be an integer"),
        ({"context": "5"}, "`context` must be an integer"),
        ({"tokens": [[1, 2], [3]]}, "`tokens` must be integers"),
        ({"tokens": [1, 2, 3]}, "`tokens` must be integers"),
        ({"tokens": [[10**6] * 48]}, "vocabulary"),
        ({"model": "kvjax-tiny"}, "`model` must be a kvjax Decoder"),
    ],
)
def test_splits_that_predict_nothing(model, tokens, fields, message):
    arguments = {"model": model, "tokens": tokens, "context": 32} | fields
    with pytest.raises(ValueError, match=message):
        fidelity(c=kvjax.Compression(), **arguments)


def test_text_as_a_task(model, text, tmp_path):
    config = tiny.config(
        tasks=[{"name": "text", "path": str(text), "context": 48, "continuation": 16}],
        visibility=["query_agnostic", "query_aware"],
    )
    rows = harness.run(model, tiny.tokenizer(), config, tmp_path / "run")
    assert len(rows) == 5  # text has no question, so it runs once
    none, *rest = rows
    assert none["kl"] == 0.0 and none["agreement"] == 1.0
    for row in rows:
        assert row["score"] is None and row["seed"] is None
        assert row["length"] == 64 and row["items"] == 5
        assert row["nll"] > 0 and row["ms_per_token"] is None
    assert all(row["kl"] > 0 for row in rest)
    for row in rows:  # the first window, token by token
        name = row["cell"]
        entry = json.loads((tmp_path / "run" / "maps" / f"{name}.json").read_text())
        found = entry["following"]
        (file,) = (tmp_path / "run" / "items").glob(f"{name}.parquet")
        item = read_rows(file)[0]
        for of_map, of_item in (("kl", "kl"), ("nll", "nll"), ("agrees", "agrees")):
            assert len(found[of_map]) == 15
            assert np.mean(found[of_map]) == pytest.approx(item[of_item], rel=1e-3)
        assert "".join(found["tokens"]) == text.read_text()[47:63]
    again = harness.run(model, tiny.tokenizer(), config, tmp_path / "run")
    assert again == rows


def test_the_reference_of_a_text_is_read_as_methods_are(model, text, tmp_path):
    task = {"name": "text", "path": str(text), "context": 48, "continuation": 16}
    config = tiny.config(tasks=[task], compressions=[], keeps=[0.5], share_passes=True)
    none, random = harness.run(model, tiny.tokenizer(), config, tmp_path / "run")
    assert none["kl"] == 0.0 < random["kl"]


def test_windows_of_a_text(text, tmp_path, monkeypatch):
    tokenizer = Tokenizer(tiny.tokenizer(), 100)
    task = TextTask(path=str(text), context=20, continuation=5)
    windows = task.windows(tokenizer, 4)
    assert windows.shape == (4, 25)
    assert (windows[:, 0] == 1).all()
    assert tokenizer.decode(windows[0].tolist()) == text.read_text()[:24]
    with pytest.raises(ValueError, match="Lower `items`"):
        task.windows(tokenizer, 1000)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        TextTask(path=str(tmp_path / "bytes")).windows(tokenizer, 1)
    (tmp_path / "accents").write_text("déjà vu " * 9)
    with pytest.raises(ValueError, match="'àé'"):
        TextTask(path=str(tmp_path / "accents")).windows(tokenizer, 1)
    monkeypatch.setenv("HOME", str(text.parent))
    task = TextTask(path=f"~/{text.name}", context=20, continuation=5)
    assert (task.windows(tokenizer, 4) == windows).all()


def test_a_real_model_on_a_real_text(shared_data):
    folder = shared_data / "models" / "stories260k"
    book = shared_data / "lm" / "tinyshakespeare"
    if not folder.is_dir() or not book.is_dir():
        pytest.skip("needs models/stories260k and lm/tinyshakespeare")
    model, tokenizer = kvjax.load(folder, dtype="float32")
    tokenizer = Tokenizer(tokenizer, model.config.vocab_size)
    file = next(path for path in sorted(book.iterdir()) if path.suffix == ".txt")
    task = TextTask(path=str(file), context=192, continuation=64)
    tokens = jnp.asarray(task.windows(tokenizer, 4))
    window = {"evict.score.window": 16}
    full = fidelity(model, tokens, 192, kvjax.Compression())
    int8 = fidelity(model, tokens, 192, kvjax.compression("int8"))
    half, tenth = (
        fidelity(model, tokens, 192, kvjax.compression("snapkv", **window).with_keep(k))
        for k in (0.5, 0.1)
    )
    kl = [float(one.kl.mean()) for one in (full, int8, half, tenth)]
    assert kl == sorted(kl) and kl[0] == 0.0
    assert kl[1] < 1e-2
    assert full.nll.mean() < np.log(model.config.vocab_size)
    sizes = [one.resident_bytes for one in (full, int8, half, tenth)]
    assert sizes[0] > sizes[2] > sizes[3]
