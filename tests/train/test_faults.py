"""What may go wrong in a run, and what it leaves behind."""

import dataclasses
import os
import signal
from collections.abc import Iterator

import jax.numpy as jnp
import pytest
import yaml

from kvjax.cli.main import main
from kvjax.config import decode
from kvjax.interrupt import DEFAULTS
from kvjax.train.data import Mixture
from kvjax.train.recipe import (
    KeepConfig,
    OptimizerConfig,
    Stage,
    TrainConfig,
    load_config,
)
from kvjax.train.recipe.files import as_tree
from kvjax.train.run import run
from kvjax.train.run.loop import train
from kvjax.train.run.model import check_shape, model_shape, weights_of
from kvjax.train.run.progress import StepProgress
from kvjax.train.run.stored import steps_in
from tests.train.test_checkpoints import cut, damaging, largest
from tests.train.tiny_run import recipe
from tests.train.whole_run import copied, goes_on


def test_a_resumed_run_repeats_the_uninterrupted_one(whole, tmp_path, capsys):
    part = copied(whole, tmp_path, last=4)
    with (part / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "los')  # the line that a killed process was writing
    goes_on(whole, part)
    path = part / "checkpoints" / "step_4"
    assert f"resuming from {path}: 4 of 6 steps" in capsys.readouterr().out


@damaging
def test_a_damaged_newest_checkpoint(whole, tmp_path, capsys):
    part = copied(whole, tmp_path)
    cut(largest(part / "checkpoints" / "step_6"))
    config = ["--config", str(part / "recipe.yaml"), "--out", str(part)]
    assert main(["finetune", *config]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("kvjax: ") and "step_6" in said[-1]
    assert "--set resume=4" in said[-1]
    assert steps_in(part / "checkpoints") == [4, 6]
    assert main(["finetune", *config, "--set", "resume=4"]) == 0
    goes_on(whole, part)


def poisoned(config: TrainConfig, at: int):
    """The batches of a recipe, that of one step with a weight that is not finite."""
    mixture = Mixture(config.data, config.stages, config.seed)

    def batches(first: int, last: int):
        for step, batch in enumerate(mixture.batches(first, last), first):
            bad = batch.weights.at[0, 5].set(jnp.nan)
            weights = bad if step == at - 1 else batch.weights
            yield dataclasses.replace(batch, weights=weights)

    return batches


@pytest.mark.parametrize("at", [4, 5, 6])
def test_a_loss_that_is_not_a_number(at, tmp_path):
    config = recipe(log_every=100)
    weights, params = weights_of(config)
    with pytest.raises(ValueError, match=f"step {at} under compression none") as said:
        train(weights, params, config, poisoned(config, at), directory=tmp_path)
    for part in ("loss nan", "2 rows of 64 tokens", "seed 0", f"batch({at - 1})"):
        assert part in str(said.value)
    good = [2] if at == 4 else [2, 4]
    assert steps_in(tmp_path / "checkpoints") == good
    assert f"last good state is {tmp_path}/checkpoints/step_{good[-1]}" in str(
        said.value
    )


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    # Loss and gradient of step 1 are fine; its update overflows.
    fast = OptimizerConfig(name="adamw", weight_decay=1e6, warmup=0, decay=1)
    # No recipe may say such a rate; what overflows in practice does so slowly.
    object.__setattr__(fast, "learning_rate", 3e38)
    config = recipe(optimizer=fast, save_every=1)
    with pytest.raises(ValueError, match="step 1 .* not finite.* no state was saved"):
        run(config, tmp_path)
    assert steps_in(tmp_path / "checkpoints") == []


@pytest.fixture
def signals() -> Iterator[None]:
    """Handlers as of a process in the foreground.

    Shells start background jobs with SIGINT ignored, which children inherit.
    """
    found = {number: signal.getsignal(number) for number in DEFAULTS}
    for number, handler in DEFAULTS.items():
        signal.signal(number, handler)
    yield
    for number, handler in found.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", list(DEFAULTS), ids=lambda s: s.name)
def test_a_signal_saves_and_the_same_command_goes_on(whole, tmp_path, number, signals):
    def told(progress: StepProgress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        run(recipe(), tmp_path, progress=told)
    assert steps_in(tmp_path / "checkpoints") == [2, 3]
    for one, handler in DEFAULTS.items():
        assert signal.getsignal(one) is handler
    goes_on(whole, tmp_path)


def test_ctrl_c_on_the_command_line(whole, tmp_path, monkeypatch, capsys, signals):
    from kvjax.train.run import loop

    part = copied(whole, tmp_path, last=4)
    plain = loop.Sampler.at

    def interrupting(self, step):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self, step)

    monkeypatch.setattr(loop.Sampler, "at", interrupting)
    config = ["--config", str(part / "recipe.yaml"), "--out", str(part)]
    assert main(["finetune", *config]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert steps_in(part / "checkpoints") == [4, 5]
    monkeypatch.undo()
    goes_on(whole, part)


def test_rows_wider_than_the_context(tmp_path):
    model = recipe().model
    assert model is not None
    short = dataclasses.replace(model, max_positions=48)
    with pytest.raises(ValueError, match="rows of 64 tokens.*`max_positions`.* 48"):
        run(recipe(model=short), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_of_another_recipe(whole, tmp_path):
    part = copied(whole, tmp_path)
    other = recipe(optimizer=OptimizerConfig(name="adamw", warmup=2, decay=1))
    with pytest.raises(ValueError, match="`optimizer.warmup` is 1 there and 2 here"):
        run(other, part)
    with pytest.raises(ValueError, match="`seed` is 0 there and 1 here"):
        run(recipe(seed=1), part)
    assert load_config(part / "recipe.yaml") == recipe()
    (part / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="has checkpoints and no recipe.yaml"):
        run(recipe(), part)


def test_steps_and_logs_may_change(whole, tmp_path):
    part = copied(whole, tmp_path)
    longer = (Stage(steps=7, lengths={64: 1.0}, tokens_per_step=128),)
    more = recipe(stages=longer, log_every=7, keep=KeepConfig(newest=1, best=0))
    assert int(run(more, part).step) == 7
    assert steps_in(part / "checkpoints") == [7]
    assert yaml.safe_load((part / "recipe.yaml").read_text())["log_every"] == 7
    with pytest.raises(ValueError, match="has done 7 steps; the recipe asks for 6"):
        run(recipe(), part)


def test_a_directory_that_another_run_writes_to(whole, tmp_path):
    part = copied(whole, tmp_path, last=4)
    refused = []

    def told(progress: StepProgress) -> None:
        with pytest.raises(ValueError, match=r"another run.*--out") as said:
            run(recipe(), part)
        refused.append(str(said.value))

    run(recipe(), part, progress=told)
    assert len(refused) == 2 and str(part) in refused[0]
    goes_on(whole, part)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sampling": {"choices": [{"compression": "duo"}]}}, r"g.choices\[0\].*gates"),
        ({"sampling": {"choices": [{"compression": "dms"}]}}, r"\[0\].*evictor"),
        ({"cached": {"choices": [{"compression": "matryoshka"}]}}, r"d.choices\[0\].*"),
        ({"lora": {"rank": 60_000}}, "`lora.rank` is 60000.*Lower it"),
        ({"lora": {"rank": 9, "modules": ["q", "k"]}}, "matrix 'k' has 8 rows"),
        ({"stages": [{"steps": 1, "lengths": {4096: 1}}]}, "rows of 4096 tokens"),
    ],
)
def test_what_the_model_lacks_is_said_before_it_is_loaded(changed, says, monkeypatch):
    tree = as_tree(recipe()) | changed
    shape = model_shape(recipe())
    with pytest.raises(ValueError, match=says):
        check_shape(decode(tree, TrainConfig), shape)


def test_ranks_are_those_of_the_matrices_that_are_named():
    tree = as_tree(recipe()) | {"lora": {"rank": 9, "modules": ["q", "gate"]}}
    check_shape(decode(tree, TrainConfig), model_shape(recipe()))


def test_steps_of_more_rows_than_can_be_made():
    with pytest.raises(ValueError, match="is 4194304 rows of 64 tokens.*Lower it"):
        Stage(steps=1, lengths={64: 1.0, 4096: 1.0}, tokens_per_step=2**28)
    assert (
        Stage(steps=1, lengths={4096: 1.0}, tokens_per_step=2**28).rows(4096) == 2**16
    )
