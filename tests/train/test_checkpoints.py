"""Checkpoints: what comes back, which stay, what is said of damage."""

import dataclasses
import functools
import pathlib
import resource
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.train.recipe import KeepConfig, OptimizerConfig
from kvjax.train.run.checkpoints import Checkpoints, restore
from kvjax.train.run.optimizer import make_optimizer
from kvjax.train.run.step import TrainState, init_state
from kvjax.train.run.stored import named, not_finite, steps_in


def damaging(test: Callable) -> Callable:
    """Marks a test in which orbax fails to read or to write, in a thread of its own."""
    quiet = "ignore::pytest.PytestUnhandledThreadExceptionWarning"
    return pytest.mark.filterwarnings(quiet)(test)


@pytest.fixture
def state() -> TrainState:
    """One of nested tuples and masks: Muon beside AdamW, with accumulation."""
    params = {
        "layers.mlp.up.kernel": jax.random.normal(jax.random.key(0), (2, 32, 64)),
        "embedding": jnp.ones((3, 4)),
        "norm.weight": jnp.ones(3),
    }
    optimizer = make_optimizer(OptimizerConfig(accumulate=2), 10)
    return init_state(params, optimizer)


def at(state: TrainState, step: int) -> TrainState:
    params = {name: x + step for name, x in state.params.items()}
    return dataclasses.replace(state, step=jnp.int32(step), params=params)


def saved(directory: pathlib.Path, state: TrainState, *steps: int) -> None:
    with Checkpoints(directory, KeepConfig(best=1)) as checkpoints:
        for step in steps:
            metrics = {"stage": 0, "answer_loss": 1.0 + step}
            checkpoints.save(at(state, step), metrics)


def equal(one: TrainState, other: TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_is_saved_comes_back(state, tmp_path):
    assert restore(tmp_path / "none", state) is state
    saved(tmp_path, state, 3, 7)
    equal(restore(tmp_path, state), at(state, 7))
    assert "params.layers.mlp.up.kernel" in named(state)
    assert len(named(state)) == len(jax.tree.leaves(state))


def test_a_save_is_of_the_state_it_was_given(state, tmp_path):
    big = dataclasses.replace(state, params={"w": jnp.zeros((512, 1024))})
    step = jax.jit(lambda s: at(s, 1), donate_argnums=0)
    with Checkpoints(tmp_path, KeepConfig()) as checkpoints:
        checkpoints.save(big)
        for _ in range(5):
            big = step(big)
    assert not np.any(restore(tmp_path, big).params["w"])


def test_the_newest_and_the_best_stay(state, tmp_path):
    values = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 2.0, 6: 9.0}
    better = []
    with Checkpoints(tmp_path, KeepConfig(newest=2, best=1)) as checkpoints:
        for step, value in values.items():
            metrics = None if value is None else {"stage": 0, "answer_loss": value}
            if checkpoints.improves(metrics):
                better.append(step)
            checkpoints.save(at(state, step), metrics)
    assert better == [1, 2] and steps_in(tmp_path) == [2, 5, 6]
    with Checkpoints(tmp_path, KeepConfig(newest=1, best=1)) as checkpoints:
        assert not checkpoints.improves({"stage": 0, "answer_loss": 1.5})
        later = {"stage": 1, "answer_loss": 3.0}  # of longer rows
        assert checkpoints.improves(later)
        checkpoints.save(at(state, 7), later)
        checkpoints.save(at(state, 8), {"stage": 1, "answer_loss": 4.0})
    assert steps_in(tmp_path) == [7, 8]


def test_accuracies_are_better_when_higher(state, tmp_path):
    with Checkpoints(tmp_path, KeepConfig(metric="exact")) as checkpoints:
        checkpoints.save(at(state, 1), {"stage": 0, "exact": 0.5})
        assert checkpoints.improves({"stage": 0, "exact": 0.6})
        assert not checkpoints.improves({"stage": 0, "exact": 0.4})
        assert not checkpoints.improves({"stage": 0, "exact": float("nan")})


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(directory: pathlib.Path) -> pathlib.Path:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@damaging
@pytest.mark.parametrize(
    "harm",
    [
        lambda path: cut(largest(path)),
        lambda path: flip(largest(path)),
        lambda path: largest(path).unlink(),
        lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
        lambda path: cut(path / "metrics" / "metrics"),
        lambda path: (path / "state" / "_METADATA").unlink(),
    ],
    ids=["cut", "flip", "lost", "metadata", "metrics", "leaves"],
)
def test_a_damaged_one_is_named_and_the_one_before_offered(
    harm: Callable[[pathlib.Path], None], state, tmp_path
):
    saved(tmp_path, state, 3, 7)
    harm(tmp_path / "step_7")
    with pytest.raises(ValueError, match="damaged") as said:
        restore(tmp_path, state)
    assert str(tmp_path / "step_7") in str(said.value)
    assert "--set resume=3" in str(said.value)
    assert steps_in(tmp_path) == [3, 7]
    equal(restore(tmp_path, state, resume=3), at(state, 3))
    assert steps_in(tmp_path) == [3]
    saved(tmp_path, state, 7)


@damaging
def test_the_only_one_has_none_before_it(state, tmp_path):
    saved(tmp_path, state, 3)
    cut(largest(tmp_path / "step_3"))
    with pytest.raises(ValueError, match="none before"):
        restore(tmp_path, state)


def test_other_leaves_are_refused_by_name(state, tmp_path):
    saved(tmp_path, state, 3)
    wider = {**state.params, "norm.weight": jnp.ones(5)}
    with pytest.raises(ValueError, match=r"norm.weight' has shape \(3,\) there"):
        restore(tmp_path, dataclasses.replace(state, params=wider))
    more = {**state.params, "lora": jnp.ones(5)}
    with pytest.raises(ValueError, match="'params.lora' has shape none there"):
        restore(tmp_path, dataclasses.replace(state, params=more))


def test_a_step_that_is_not_there(state, tmp_path):
    saved(tmp_path, state, 3, 7)
    with pytest.raises(ValueError, match=r"step 5; .* of \[3, 7\]"):
        restore(tmp_path, state, resume=5)


@damaging
def test_a_failed_write_keeps_what_is_there(state, tmp_path):
    checkpoints = Checkpoints(tmp_path, KeepConfig())
    checkpoints.save(at(state, 3))
    checkpoints.wait()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the kernel refuses longer files, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        with pytest.raises(OSError, match="are kept: step_3"):
            checkpoints.save(at(state, 5))
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert steps_in(tmp_path) == [3]
    assert checkpoints.last_saved == tmp_path / "step_3"
    equal(restore(tmp_path, state), at(state, 3))
    assert [path.name for path in tmp_path.iterdir()] != ["step_3"]
    saved(tmp_path, state, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"step_3", "step_5"}


def test_leaves_that_are_not_finite_are_named(state):
    assert not_finite(state) == []
    broken = {**state.params, "embedding": jnp.full((3, 4), jnp.inf)}
    assert not_finite(dataclasses.replace(state, params=broken)) == ["params.embedding"]


@pytest.mark.parametrize(
    "fields", [{"newest": 0}, {"best": -1}, {"metric": "answer_los"}]
)
def test_wrong_settings(fields):
    with pytest.raises(ValueError, match="KeepConfig"):
        functools.partial(KeepConfig, **fields)()
