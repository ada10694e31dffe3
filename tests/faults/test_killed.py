"""`save` that is killed anywhere: the old model or the new one, never some of both."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from kvjax.eval.record import fingerprint
from kvjax.models import Decoder, load, save
from tests.faults.killing import Killed, calls, killed_at
from tests.models.samples import sample


def other(model: Decoder) -> Decoder:
    """The same shapes, another configuration, and weights that are all others."""
    import dataclasses

    import jax
    from flax import nnx

    config = dataclasses.replace(model.config, norm_eps=model.config.norm_eps * 2)
    made = Decoder(config, dtype=model.dtype, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(made, jax.tree.map(lambda x: x * 2 + 1, state))
    return made


def told(folder: pathlib.Path) -> str:
    """Whose model it is, or what is said of it."""
    try:
        return fingerprint(load(folder, "float32", tokenizer=False)[0])
    except ValueError as wrong:
        return str(wrong)


@pytest.fixture(scope="module")
def models() -> tuple[Decoder, Decoder]:
    old = sample("llama")
    return old, other(old)


@pytest.fixture(params=["one", "many"])
def shards(request, monkeypatch) -> None:
    """Weights in one file, or in several."""
    if request.param == "many":
        monkeypatch.setattr("kvjax.models.weights.SHARD_BYTES", 20_000)


def survives(models, folder: pathlib.Path, fresh: bool, call: int) -> str:
    old, new = models
    names = {fingerprint(old): "old", fingerprint(new): "new"}
    shutil.rmtree(folder, ignore_errors=True)
    if not fresh:
        save(old, folder)
    with pytest.raises(Killed), killed_at(call, folder.parent):
        save(new, folder)
    found = told(folder)
    if found not in names:
        assert str(folder) in found and len(found) < 900, found
    save(new, folder)
    assert names[told(folder)] == "new"
    return names.get(found, "refused")


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["over another", "fresh"])
def test_save_killed_at_any_call(models, shards, tmp_path, fresh):
    folder = tmp_path / "model"
    if not fresh:
        save(models[0], folder)
    total = calls(tmp_path, lambda: save(models[1], folder))
    assert total > 5
    found = [survives(models, folder, fresh, call) for call in range(total)]
    # Old at first, new at last, and nothing of the old one behind the new one.
    assert found[0] == ("refused" if fresh else "old")
    order = {"old": 0, "refused": 1, "new": 2}
    assert [order[one] for one in found] == sorted(order[one] for one in found)


CHILD = textwrap.dedent(
    """
    import pathlib, sys
    from kvjax.models import save
    from tests.faults.test_killed import other
    from tests.models.samples import sample

    old = sample("llama")
    new, where = other(old), pathlib.Path(sys.argv[1])
    save(old, where)
    print("saved", flush=True)
    while True:
        save(new, where)
        save(old, where)
    """
)


@pytest.mark.slow
@pytest.mark.sweep(0, 1)
@pytest.mark.parametrize("draw", range(4))
def test_saves_killed_for_real(models, tmp_path, repo, draw):
    """Each process saves again and again, into what the one before it left."""
    folder = tmp_path / "model"
    known = {fingerprint(model) for model in models}
    rng = np.random.default_rng(draw)
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)],
            cwd=repo,
            env=os.environ | {"PYTHONPATH": str(repo)},
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None and child.stdout.readline() == b"saved\n"
            time.sleep(float(rng.uniform(0, 0.3)))
            child.send_signal(signal.SIGKILL)
        found = told(folder)
        assert found in known or str(folder) in found
