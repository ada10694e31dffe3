"""What a run tells while it goes: writers of scalars, answers through the cache."""

import dataclasses
import json
import sys
import types

import pytest
from flax import nnx

from kvjax.compress.config import Compression
from kvjax.models.decoder import Decoder
from kvjax.train.held_out.cached import (
    FULL,
    CachedEvaluation,
    cached_replies,
    questions,
)
from kvjax.train.recipe import (
    CachedConfig,
    CompressionChoice,
    LogConfig,
    SamplingConfig,
    Stage,
)
from kvjax.train.run import run
from tests.train.greedy import replies
from tests.train.tiny_run import losses, recipe

SHORT = (Stage(steps=1, lengths={64: 1.0}, tokens_per_step=128),)
LONGER = (Stage(steps=2, lengths={64: 1.0}, tokens_per_step=128),)


def test_a_writer_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for log, extra in (
        (LogConfig(tensorboard=True), "tensorboard"),
        (LogConfig(tracker="trackio"), "trackio"),
        (LogConfig(tracker="wandb"), "wandb"),
    ):
        with pytest.raises(ValueError, match=rf"'kvjax\[{extra}\]'"):
            run(recipe(log=log), tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'wandb'"):
        LogConfig(tracker="wand")
    assert not list(tmp_path.iterdir())


class Recorder:
    """Stands for tensorboardX and for a tracker."""

    def __init__(self, *given, **options):
        self.given, self.options, self.seen = given, options, []

    def add_scalar(self, name, value, step):
        self.seen.append((step, name, value))

    def close(self):
        self.seen.append("closed")


@pytest.mark.slow
def test_writers_get_the_numbers_of_the_log(tmp_path, monkeypatch):
    made: list[Recorder] = []
    board = types.ModuleType("tensorboardX")
    board.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    board.SummaryWriter = lambda *a, **k: made.append(Recorder(*a, **k)) or made[-1]  # type: ignore[attr-defined]
    tracker = types.ModuleType("trackio")
    tracker.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    calls: list[tuple] = []
    tracker.init = lambda **k: calls.append(("init", k))  # type: ignore[attr-defined]
    tracker.log = lambda v, step: calls.append((step, v))  # type: ignore[attr-defined]
    tracker.finish = lambda: calls.append(("finish",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    part = tmp_path / "run"
    run(recipe(stages=SHORT), part)
    log = LogConfig(tensorboard=True, tracker="trackio")
    run(recipe(stages=LONGER, log=log), part)
    (writer,) = made
    assert writer.given == (str(part / "tensorboard"),)
    assert writer.options == {"purge_step": 2}
    scalars = {(e[0], e[1]): e[2] for e in writer.seen if e != "closed"}
    assert scalars[2, "train/loss"] == dict(losses(part))[2]
    assert (2, "held_out/recall@64/answer_loss") in scalars
    assert (1, "train/loss") not in scalars and writer.seen[-1] == "closed"
    assert calls[0][1]["project"] == "kvjax" and calls[0][1]["name"] == "run"
    assert (
        calls[-1] == ("finish",)
        and calls[1][1]["train/loss"] == scalars[2, "train/loss"]
    )


CHOICES = (
    CompressionChoice(compression="none"),
    CompressionChoice(compression="knorm", keeps=(0.5, 0.25)),
    CompressionChoice(
        compression="kivi_2bit", fields={"store.residual": 0, "store.keys.group": 8}
    ),
)


def test_replies_through_the_cache_are_those_without_one():
    config = recipe(cached=CachedConfig(items=4))
    assert config.model is not None
    sharp = dataclasses.replace(config.model, init_std=0.5)
    model = Decoder(sharp, rngs=nnx.Rngs(0))
    asked = questions(config, 64)
    assert len(asked.items) == 4
    task = asked.items[0][0]
    want = replies(model, [item for _, item in asked.items], task.max_new_tokens)
    assert cached_replies(model, asked, Compression()) == want
    assert len(set(want)) > 1


@pytest.mark.slow
def test_evaluation_through_the_cache_is_logged_by_compression(tmp_path):
    config = recipe(
        stages=SHORT,
        sampling=SamplingConfig(choices=CHOICES[:2]),
        cached=CachedConfig(items=2),
    )
    run(config, tmp_path)
    events = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    cached = [(e["cached"], e["step"], e["accuracy"]) for e in events if "cached" in e]
    assert cached == [(FULL, 1, 0.0), ("knorm-keep0.25", 1, 0.0)]


def test_compressions_of_the_evaluation():
    sampled = SamplingConfig(choices=CHOICES)
    config = recipe(sampling=sampled, cached=CachedConfig(items=2))
    assert config.model is not None
    made = CachedEvaluation(config, config.model)
    assert list(made.compressions) == [FULL, "knorm-keep0.25", "kivi_2bit"]
    two = (CompressionChoice(compression="h2o", keeps=(0.5, 0.25)),)
    chosen = dataclasses.replace(config, cached=CachedConfig(items=2, choices=two))
    names = list(CachedEvaluation(chosen, config.model).compressions)
    assert names == [FULL, "h2o-keep0.5", "h2o-keep0.25"]
    wide = (CompressionChoice(compression="snapkv", keeps=(0.1,)),)
    wrong = dataclasses.replace(config, cached=CachedConfig(items=2, choices=wide))
    with pytest.raises(ValueError, match=r"cannot run under 'snapkv-keep0.1'.*choices"):
        CachedEvaluation(wrong, config.model)
    none = dataclasses.replace(config, cached=CachedConfig(items=0, choices=wide))
    assert CachedEvaluation(none, config.model)(None, 1) == {}  # type: ignore[arg-type]
