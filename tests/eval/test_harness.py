"""The harness: what rows say, and what they cost."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx

import kvjax
from kvjax.eval import harness, reading
from kvjax.eval.config import decode_config
from kvjax.eval.header import read_header
from kvjax.eval.plan import plan
from kvjax.eval.questions import QuestionGroup
from kvjax.eval.record import fingerprint, mean
from kvjax.eval.results import load_rows
from kvjax.eval.rows import ITEMS, ROWS
from kvjax.eval.timing import timed, union
from kvjax.models.config import Evictor, Projection
from kvjax.models.evictor import with_evictor
from kvjax.models.gates import with_gates
from kvjax.models.projection import with_projection
from kvjax.models.prompts import read_prompt
from kvjax.models.shared_pass import read_shared
from tests.eval import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def both(model, tokenizer, tmp_path_factory):
    """A finished run with both arms of visibility."""
    config = tiny.config(
        visibility=["query_agnostic", "query_aware"],
        compressions=["snapkv", "int8"],
        items=4,
    )
    path = tmp_path_factory.mktemp("runs") / "both"
    return config, path, harness.run(model, tokenizer, config, path)


def replies(path, cell):
    table = pq.ParquetFile(path / "items" / f"{cell}.parquet").read()
    assert table.schema.equals(ITEMS)
    return table.column("reply").to_pylist()


def test_every_cell_has_a_row_items_and_a_map(both):
    config, path, rows = both
    # none, random x2, snapkv x2, int8, in both arms.
    assert len(rows) == 2 * (1 + 2 + 2 + 1)
    table = load_rows(path)
    assert table.schema.equals(ROWS)
    assert sorted(table.column("cell").to_pylist()) == sorted(r["cell"] for r in rows)
    for row in rows:
        assert set(row) == set(ROWS.names)
        assert len(replies(path, row["cell"])) == config.items
        kept = json.loads((path / "maps" / f"{row['cell']}.json").read_text())
        assert set(kept) >= {"text", "question", "compression", "keep", "task", "kept"}
        assert len(kept["kept"]) == 2 and len(kept["kept"][0]) == 2
        held = {len(head) for layer in kept["kept"] for head in layer}
        if row["keep"] is not None:
            assert held == {-(-len(kept["tokens"]) * int(row["keep"] * 100) // 100)}
        assert "".join(kept["tokens"][1:]) == kept["text"]
        assert bool(kept["question"]) == (row["visibility"] == "query_agnostic")


def test_none_and_random_always_run(both):
    _, _, rows = both
    ran = {(r["compression"], r["keep"], r["visibility"]) for r in rows}
    for visibility in ("query_agnostic", "query_aware"):
        assert ("none", None, visibility) in ran
        assert ("random", 0.5, visibility) in ran
        assert ("random", 0.25, visibility) in ran
        assert ("int8", None, visibility) in ran


def test_rows_of_none_are_the_reference(both):
    _, _, rows = both
    for row in rows:
        full = next(
            r
            for r in rows
            if r["compression"] == "none" and r["visibility"] == row["visibility"]
        )
        assert row["full_bytes"] == full["resident_bytes"]
        if row is full:
            assert row["agreement"] == 1.0 and row["agreement_se"] == 0.0
        else:
            assert row["resident_bytes"] < row["full_bytes"]


def test_bytes_are_those_of_the_cache(both, model, tokenizer):
    config, _, rows = both
    made = plan(model.config, tokenizer, config)
    by_cell = {row["cell"]: row for row in rows}
    for cell in made.all_cells():
        tokens, lengths = cell.group.read(next(cell.group.batches()))
        c = cell.method.at(cell.keep, cell.group.visibility)
        prompt = read_prompt(model, tokens, lengths, c)
        cache = prompt.compress(c, max_new_tokens=cell.group.room)
        assert by_cell[cell.name]["resident_bytes"] == cache.nbytes / config.batch


def test_replies_are_those_of_each_prompt_alone(both, model, tokenizer):
    config, path, _ = both
    made = plan(model.config, tokenizer, config)
    for cell in made.all_cells():
        if cell.keep == 0.25 or cell.method.name in ("none", "random"):
            continue
        assert isinstance(cell.group, QuestionGroup)
        c = cell.method.at(cell.keep, cell.group.visibility)
        tokens = jnp.array([cell.group.prompts[3]])
        logits, cache = kvjax.prefill(model, tokens, None, c, max_new_tokens=32)
        if cell.group.asked[3][0]:
            question = jnp.array([cell.group.asked[3][0]])
            logits, cache = kvjax.extend(model, cache, question)
            logits = logits[:, -1]
        out = kvjax.generate_from(model, cache, logits, max_new_tokens=3)
        text = tokenizer.decode(np.asarray(out.tokens[0]), skip_special_tokens=True)
        stop = text.find("]") + 1 or len(text)
        assert replies(path, cell.name)[3] == text[:stop]


@pytest.mark.slow
def test_batch_size_changes_nothing(both, model, tokenizer, tmp_path):
    config, path, rows = both
    small = tiny.config(
        compressions=list(config.compressions),
        visibility=["query_agnostic"],
        items=4,
        batch=4,
    )
    again = harness.run(model, tokenizer, small, tmp_path / "run")
    for row in again:
        old = next(r for r in rows if r["cell"] == row["cell"])
        assert (row["score"], row["agreement"]) == (old["score"], old["agreement"])
        assert replies(path, row["cell"]) == replies(tmp_path / "run", row["cell"])


def test_prompts_are_read_once_for_all_budgets(model, tokenizer, tmp_path, monkeypatch):
    calls = []
    read = reading.read_prompt

    def counted(model, tokens, lengths, c):
        calls.append(c)
        return read(model, tokens, lengths, c)

    monkeypatch.setattr(reading, "read_prompt", counted)
    harness.run(model, tokenizer, tiny.config(), tmp_path / "a")
    assert len(calls) == 3 * 2  # none, random, snapkv; two batches
    rows = harness.run(model, tokenizer, tiny.config(seed=9), tmp_path / "b")
    assert all(row["compile_s"] == 0.0 for row in rows)  # every shape was there


@pytest.mark.slow
def test_methods_may_share_a_pass(model, tokenizer, tmp_path, monkeypatch):
    config = tiny.config(
        compressions=["h2o", "snapkv", "vertical_slash", "kvzip"],
        overrides={"kvzip": {"evict.score.chunk": 32}},
    )
    alone = harness.run(model, tokenizer, config, tmp_path / "alone")
    calls, read = [], reading.read_shared

    def counted(model, tokens, lengths, prefill, *, mass):
        calls.append(prefill)
        return read(model, tokens, lengths, prefill, mass=mass)

    monkeypatch.setattr(reading, "read_shared", counted)
    config = dataclasses.replace(config, share_passes=True)
    shared = harness.run(model, tokenizer, config, tmp_path / "shared")
    assert len(calls) == 2 * 2  # two ways to read, two batches
    for one, other in zip(alone, shared, strict=True):
        assert one["resident_bytes"] == other["resident_bytes"]
        assert replies(tmp_path / "alone", one["cell"]) == replies(
            tmp_path / "shared", one["cell"]
        )
        assert other["prefill_ms"] > 0


def test_a_shared_pass_shows_what_the_method_sees(model):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 100, (2, 64)).astype(np.int32)
    lengths = np.array([64, 50], np.int32)
    for name in ("h2o", "expected_attention"):
        c = kvjax.compression(name)
        want = read_prompt(model, tokens, lengths, c)
        passed = read_shared(model, tokens, lengths, c.prefill, mass=True)
        got = passed.prompt(c)
        assert got.method == want.method
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    bare = read_shared(model, tokens, lengths, c.prefill)
    with pytest.raises(ValueError, match="mass=True"):
        bare.prompt(kvjax.compression("h2o"))
    with pytest.raises(ValueError, match="was read with Dense"):
        bare.prompt(kvjax.compression("vertical_slash"))


def test_prompts_that_are_too_short_for_a_pattern_are_named(model, caplog):
    reader = reading.PromptReader(model)
    pattern = kvjax.compression("xattention", **{"prefill.dense_below": 100}).prefill
    reader._note_dense(pattern, [100, 250])
    reader._note_dense(kvjax.compression("none").prefill, [10])
    assert not caplog.records
    for _ in range(2):  # said once
        reader._note_dense(pattern, [99, 100, 40])
    assert [record.getMessage() for record in caplog.records] == [
        "XAttention: 2 of 3 prompts have fewer than 100 tokens and are read densely; "
        "prefill.dense_below=0 has all of them read sparsely"
    ]


def test_compiling_is_not_running(both):
    for row in both[2]:
        assert row["prefill_ms"] > 0 and row["compress_ms"] > 0
        assert row["ms_per_token"] is None or row["ms_per_token"] > 0
    program = jax.jit(lambda x: jnp.cumsum(jnp.sort(x) @ x))
    x = jnp.ones((8, 8))
    first, second = timed(lambda: program(x)), timed(lambda: program(x))
    assert first.compile_s > first.run_s
    assert second.compile_s == 0.0 < second.run_s


def test_union_counts_nested_spans_once():
    assert union([]) == 0.0
    assert union([(0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (8.0, 9.0)]) == 7.0


def test_mean_and_standard_error():
    items = [{"score": 1.0}, {"score": 0.0}, {"score": 1.0}, {"score": 1.0}]
    value, error = mean(items, "score")
    assert value == 0.75
    assert error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)  # binomial, unbiased
    assert mean(items[:1], "score") == (1.0, None)
    assert mean(items, "nll") == (None, None)


def test_needle_rows_have_depths(model, tokenizer, tmp_path):
    config = tiny.config(
        tasks=[{"name": "niah", "items": 2}], depths=[0.0, 1.0], keeps=[0.5]
    )
    rows = harness.run(model, tokenizer, config, tmp_path / "run")
    assert [row["depth"] for row in rows] == [0.0, 1.0] * 3
    assert {row["items"] for row in rows} == {2}
    assert rows[0]["agreement"] == rows[1]["agreement"] == 1.0
    texts = [
        json.loads((tmp_path / "run" / "maps" / f"{row['cell']}.json").read_text())
        for row in rows[:2]
    ]
    assert texts[0]["text"] != texts[1]["text"]


def test_the_header_says_what_ran(both, model):
    config, path, _ = both
    header = read_header(path)
    assert header["model_fingerprint"] == fingerprint(model)
    assert header["config"]["items"] == config.items
    assert fingerprint(tiny.model(norm_eps=1e-5)) != fingerprint(model)


@pytest.mark.slow
def test_progress_is_told_after_every_cell(model, tokenizer, tmp_path):
    told = []
    config = tiny.config(items=2, batch=2)
    for _ in range(2):
        harness.run(model, tokenizer, config, tmp_path / "r", progress=told.append)
    assert [state.done for state in told] == [1, 2, 3, 4, 5] * 2
    assert [state.resumed for state in told] == [False] * 5 + [True] * 5
    assert all(state.total == 5 for state in told)


def test_weights_that_are_not_numbers(tokenizer, tmp_path):
    broken = tiny.model()
    weights = nnx.state(broken, nnx.Param)
    nnx.update(broken, jax.tree.map(lambda x: x * jnp.nan, weights))
    with pytest.raises(ValueError, match="not finite"):
        harness.run(broken, tokenizer, tiny.config(), tmp_path / "run")


@pytest.mark.slow
def test_the_bundled_model(repo, tmp_path):
    folder = repo / "configs" / "model" / "kvjax-tiny"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("configs/model/kvjax-tiny is not there")
    model, tokenizer = kvjax.load(folder, dtype="float32")
    config = decode_config(
        {
            "compressions": ["snapkv", "kivi_4bit"],
            "keeps": [1.0, 0.125],
            "tasks": ["fact", {"name": "batch", "fields": {"problems": 3}}],
            "visibility": ["query_aware"],
            "lengths": [256],
            "items": 16,
            "window": 16,
            "reply_tokens": 32,
        }
    )
    rows = harness.run(model, tokenizer, config, tmp_path / "run")
    by = {(r["task"], r["compression"], r["keep"]): r for r in rows}
    for task in ("fact", "batch"):
        none = by[task, "none", None]
        assert none["score"] > 0.2
        assert by[task, "snapkv", 1.0]["agreement"] == 1.0
        assert by[task, "snapkv", 1.0]["score"] == none["score"]
        assert by[task, "random", 0.125]["score"] < none["score"]
        assert by[task, "kivi_4bit", None]["agreement"] > 0.5
    assert by["batch", "snapkv", 0.125]["agreement"] < 1.0


PARTS = 6


@pytest.mark.slow
@pytest.mark.sweep(0, 2)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_preset_runs(part, model, tokenizer, tmp_path):
    names = kvjax.compressions()[part::PARTS]
    model = with_evictor(model, Evictor(kind="neuron"))  # which some presets ask for
    model = with_projection(model, Projection())
    heads = (model.config.num_layers, model.config.num_kv_heads)
    model = with_gates(model, np.linspace(0, 1, math.prod(heads)).reshape(heads))
    config = tiny.config(
        compressions=list(names),
        keeps=[0.5],
        lengths=[160],
        items=2,
        batch=2,
        window=8,
        visibility=["query_agnostic", "query_aware"],
        defaults={"evict.score.chunk": 32},  # replays must fit the model, too
    )
    rows = harness.run(model, tokenizer, config, tmp_path / "run")
    assert {row["compression"] for row in rows} == {*names, "none", "random"}
    assert all(row["agreement"] is not None for row in rows)
