"""Held-out rows of datasets through the real cache: values, rows, programs, faults."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.compress.config import Compression
from kvjax.models import Decoder, inference
from kvjax.train.data import Mixture
from kvjax.train.data.batch import pack
from kvjax.train.data.rows import TokenRow
from kvjax.train.data.words import Words
from kvjax.train.held_out import cached_loss
from kvjax.train.held_out.cached import FULL, CachedEvaluation
from kvjax.train.held_out.cached_loss import cut, held_out_rows, loss
from kvjax.train.recipe import (
    CachedConfig,
    CompressionChoice,
    DataConfig,
    KeepConfig,
    SamplingConfig,
    Source,
    Stage,
    load_config,
)
from kvjax.train.run import run
from kvjax.train.run.checkpoints import Checkpoints
from tests.train.datasets_samples import (
    chat_words,
    merging_tokenizer,
    mixture,
    said,
    write_jsonl,
)
from tests.train.small import model_of
from tests.train.tiny_run import recipe

SNAPKV = {"evict.score.window": 4, "evict.budget.keep": 0.4}
CODES = {"store.residual": 0, "store.keys.group": 8, "store.values.group": 8}
SAMPLING = SamplingConfig(
    choices=(
        CompressionChoice(compression="none"),
        CompressionChoice(compression="knorm", keeps=(0.25,)),
    )
)

pytestmark = pytest.mark.usefixtures("datasets_cache")


def ragged() -> tuple[list[TokenRow], list[int]]:
    """Rows of several lengths, weights between 0 and 2, points anywhere.

    No token comes twice in a row: keys of equal norm would leave `knorm` to rounding.
    """
    rng = np.random.default_rng(5)
    rows, points = [], []
    for n, point in ((96, 30), (61, 60), (70, 12), (80, 47), (96, 71), (33, 31)):
        weights = rng.uniform(0, 2, n) * (rng.uniform(size=n) < 0.7)
        rows.append(
            TokenRow(
                tokens=rng.permutation(np.arange(4, 100, dtype=np.int32))[:n],
                weights=weights.astype(np.float32),
                answers=weights > 0,
                context=0,
                prompt=0,
            )
        )
        points.append(point)
    return rows, points


def simulated_loss(model, rows, points, c) -> float:
    """The same tokens in the parallel form, all at once."""
    batch = pack(rows, 96, points)
    lengths = np.array([len(one.tokens) for one in rows])
    logits = kvjax.simulate(model, batch.tokens, lengths, batch.prompt_lengths, c)
    each = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    tokens = np.asarray(batch.tokens)[:, 1:]
    each = -np.take_along_axis(each, tokens[..., None], axis=-1)[..., 0]
    behind = np.arange(1, 96) > np.asarray(points)[:, None]
    weights = np.asarray(batch.weights)[:, 1:] * behind
    return float((np.where(weights > 0, each, 0.0) * weights).sum() / weights.sum())


@pytest.mark.sweep(2, 4)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("none", {}),
        ("knorm", {"evict.budget.keep": 0.25}),
        ("snapkv", SNAPKV),
        ("kivi_2bit", CODES),
        ("snapkv_kivi", SNAPKV | CODES),
    ],
)
def test_the_loss_is_that_of_the_parallel_form(name, fields):
    c, model = kvjax.compression(name, **fields), model_of()
    rows, points = ragged()
    got = loss(model, cut(rows, points), c)
    np.testing.assert_allclose(got, simulated_loss(model, rows, points, c), atol=1e-4)
    if name != "none":
        assert abs(got - loss(model, cut(rows, points), Compression())) > 1e-3


def test_rows_and_evaluations_share_their_programs(monkeypatch):
    """However rows are grouped, and in however many calls they are fed."""
    c = kvjax.compression("knorm", **{"evict.budget.keep": 0.25})
    rows, points = ragged()
    found = cut(rows, points)
    want = loss(model_of(), found, c)
    monkeypatch.setattr(cached_loss, "PASS_TOKENS", 200)  # a group of one row
    monkeypatch.setattr(cached_loss, "CALL_TOKENS", 30)
    jitted = [inference._prefill, inference._extend, cached_loss._sum]
    before = [one._cache_size() for one in jitted]  # type: ignore[attr-defined]
    assert len(list(found.groups())) == 6
    np.testing.assert_allclose(loss(model_of(), found, c), want, atol=1e-5)
    other = Decoder(model_of().config, rngs=nnx.Rngs(1))
    loss(other, found, c)
    after = [one._cache_size() for one in jitted]  # type: ignore[attr-defined]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]


def test_the_first_token_behind_the_point_does_not_count():
    row = TokenRow(
        tokens=np.arange(4, 12, dtype=np.int32),
        weights=np.ones(8, np.float32),
        answers=np.ones(8, bool),
        context=0,
        prompt=0,
    )
    found = cut([row, row], [5, 7])
    np.testing.assert_array_equal(found.follow, [[9, 10, 11], [11, 0, 0]])
    np.testing.assert_array_equal(found.weights, [[0, 1, 1], [0, 0, 0]])
    assert found.prompt_lengths.tolist() == [5, 7]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_the_same_at_every_evaluation(tmp_path, texts, streaming):
    held_out = "train" if streaming else "train[6:]"
    source = Source(dataset=texts, text="text", held_out=held_out, streaming=streaming)
    records = [{"m": said(f"say {i}", f"it is {i * i}")} for i in range(5)]
    path = write_jsonl(tmp_path / "chats.jsonl", records)
    chats = Source(dataset=path, messages="m", held_out="train")
    one = mixture(source, chats, words=chat_words())
    first = held_out_rows(one.held_out, 5, 64, 0)
    one.batch(3)
    for again in (one, mixture(source, chats, words=chat_words())):
        for two, want in zip(
            held_out_rows(again.held_out, 5, 64, 0), first, strict=True
        ):
            for field in dataclasses.fields(want):
                np.testing.assert_array_equal(
                    getattr(two, field.name), getattr(want, field.name)
                )
    plain, talks = first
    assert len(plain.prompts) == 3 and len(talks.prompts) == 2
    assert (plain.prompt_lengths >= 16).all() and (plain.prompt_lengths < 48).all()
    assert len(set(plain.prompt_lengths.tolist())) == 3
    moved = held_out_rows(one.held_out, 5, 64, 1)[0]
    assert moved.prompt_lengths.tolist() != plain.prompt_lengths.tolist()
    assert held_out_rows(one.held_out, 1, 64, 0)[0].prompts.shape[0] == 1


def test_rows_with_nothing_behind_the_point_are_refused(tmp_path, texts):
    asked = [{"q": f"what is {i}?", "a": "x"} for i in range(4)]
    path = write_jsonl(tmp_path / "letters.jsonl", asked)
    tokenizer = merging_tokenizer()
    tokenizer.eos_token = None
    words = Words(tokenizer, 300)
    source = Source(dataset=path, prompt="q", answer="a", held_out="train[2:]")
    one = mixture(source, words=words)
    with pytest.raises(ValueError, match=r"letters.jsonl', split 'train\[2:\]'.*cache"):
        held_out_rows(one.held_out, 2, 64, 0)
    narrow = Source(dataset=texts, text="text", held_out="train")
    stages = (Stage(steps=1, lengths={2: 1.0}, tokens_per_step=2),)
    config = recipe(
        data=DataConfig(sources=(narrow,)), stages=stages, cached=CachedConfig(items=1)
    )
    with pytest.raises(ValueError, match="texts.jsonl.*have 2 tokens at most"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"texts.jsonl', split 'train\[12:\]'"):
        mixture(dataclasses.replace(narrow, held_out="train[12:]"))


def test_a_metric_that_nothing_measures_is_refused(texts):
    keep = KeepConfig(metric="cached_loss")
    config = recipe(keep=keep, cached=CachedConfig(items=2))
    assert config.model is not None
    with pytest.raises(ValueError, match="2 items and no such dataset.*answer_loss"):
        CachedEvaluation(config, config.model)
    source = Source(dataset=texts, text="text", held_out="train[6:]")
    held = Mixture(DataConfig(sources=(source,)), config.stages, 0).held_out
    none = dataclasses.replace(config, cached=CachedConfig(items=0))
    with pytest.raises(ValueError, match="0 items and such a dataset"):
        CachedEvaluation(none, config.model, held_out=held)
    keeps_none = KeepConfig(best=0, metric="cached_loss")
    CachedEvaluation(dataclasses.replace(config, keep=keeps_none), config.model)


def test_a_compression_that_does_not_fit_the_rows_is_named(texts):
    source = Source(dataset=texts, text="text", held_out="train[6:]")
    wide = (CompressionChoice(compression="snapkv", keeps=(0.1,)),)
    data = DataConfig(sources=(source,))
    config = recipe(data=data, cached=CachedConfig(items=2, choices=wide))
    held = Mixture(data, config.stages, 0).held_out
    assert config.model is not None
    with pytest.raises(ValueError, match=r"cannot run under 'snapkv-keep0.1'"):
        CachedEvaluation(config, config.model, held_out=held)


@pytest.mark.slow
def test_the_loss_is_logged_and_chooses_the_best(tmp_path, texts):
    source = Source(dataset=texts, text="text", split="train[:8]", held_out="train[8:]")
    config = recipe(
        data=DataConfig(sources=(source,)),
        sampling=SAMPLING,
        eval_every=2,
        save_every=9,
        cached=CachedConfig(items=3),
        keep=KeepConfig(newest=1, best=1, metric="cached_loss"),
    )
    run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if "cached" in event]
    names = [FULL, "knorm-keep0.25"]
    assert [(e["step"], e["cached"]) for e in events] == [
        (step, name) for step in (2, 4, 6) for name in names
    ]
    assert all(set(e) == {"step", "cached", "loss"} for e in events)
    means = {
        step: np.mean([e["loss"] for e in events if e["step"] == step])
        for step in (2, 4, 6)
    }
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", config.keep)
    with checkpoints:
        best = {"stage": 0, "cached_loss": min(means.values())}
        assert not checkpoints.improves(best)
        assert checkpoints.improves({**best, "cached_loss": best["cached_loss"] - 1e-4})


@pytest.mark.slow
def test_tasks_and_datasets_are_both_evaluated(texts):
    source = Source(dataset=texts, text="text", held_out="train[6:]")
    data = DataConfig(sources=(source, Source(task="recall")))
    config = recipe(data=data, cached=CachedConfig(items=2))
    assert config.model is not None
    held = Mixture(data, config.stages, 0).held_out
    evaluation = CachedEvaluation(config, config.model, held_out=held)
    found = evaluation(Decoder(config.model, rngs=nnx.Rngs(0)), 1)
    assert set(found) == {FULL} and set(found[FULL]) == {"accuracy", "loss"}


def test_the_recipe_for_eight_chips_is_evaluated_through_the_cache():
    config = load_config("lora_llama3_8b")
    assert config.cached.items and config.keep.metric == "cached_loss"
    (source,) = config.data.sources
    files = source.fields["data_files"]
    assert {source.split, source.held_out} == set(files)
