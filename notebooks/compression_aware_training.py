# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training a model to tolerate a small cache
#
# Eviction is done to models that never saw it coming. Here you train one for it: the
# `Compression` that the evaluation uses is simulated in every training step, with a
# gradient for which tokens are kept. You will see the curve of accuracy against bytes
# before and after three minutes of training.
#
# **Hardware**: any laptop; two CPU cores are enough. **Run time**: five minutes, three
# of them training.
#
# Open it with `jupytext --to notebook compression_aware_training.py`, or in an editor
# that knows `# %%` cells.

# %%
import dataclasses
import importlib.resources
import json
import os
import pathlib
import tempfile

from matplotlib import pyplot as plt

import kvjax
from kvjax.eval.config import EvalConfig, TaskEntry
from kvjax.eval.harness import run as evaluate
from kvjax.eval.report.curves import score_figure
from kvjax.eval.results import load_rows
from kvjax.train.recipe import CachedConfig, CompressionChoice, Stage, load_config
from kvjax.train.run import run as train

SMOKE = bool(os.environ.get("SMOKE"))  # set by the tests: less of everything
work = pathlib.Path(tempfile.mkdtemp())
base = str(importlib.resources.files("kvjax") / "configs" / "model" / "kvjax-tiny")

# %% [markdown]
# ## Before
#
# `chain` asks for the end of a chain of small sums scattered over a text. The cache is
# compressed between the text and the question: what to keep has to be decided before
# anybody knows what will be asked. `tova` keeps what the last token attends to.

# %%
asked = EvalConfig(
    compressions=("tova",),
    keeps=(0.5,) if SMOKE else (0.5, 0.25, 0.125),
    tasks=(TaskEntry(name="chain", fields={"steps": 2}),),
    lengths=(256,),
    items=4 if SMOKE else 100,
    batch=4 if SMOKE else 50,
    window=16,
)


rows = {}


def curve(name, path):
    """Accuracy against bytes of the model at `path`."""
    model, tokenizer = kvjax.load(path, dtype="float32")
    evaluate(model, tokenizer, asked, work / name)
    rows[name] = load_rows(work / name).to_pylist()
    return score_figure(rows[name], f"chain, {name}")


curve("before", base)

# %% [markdown]
# ## The recipe
#
# A recipe is a YAML file; `tolerant` is the bundled one that samples eviction,
# quantisation and both. This one trains for `tova` alone and on one task. Each step
# draws one of the choices; `none` keeps the uncompressed model what it was.

# %%
recipe = dataclasses.replace(
    load_config("eviction", ["data.sources=[{task: chain}]", f"init={base}"]),
    stages=(
        Stage(steps=2 if SMOKE else 220, lengths={256: 1.0}, tokens_per_step=4096),
    ),
    cached=CachedConfig(items=0),
)
recipe = dataclasses.replace(
    recipe,
    sampling=dataclasses.replace(
        recipe.sampling,
        ramp=40,
        choices=(
            CompressionChoice(compression="none"),
            CompressionChoice(compression="tova", keeps=(0.5, 0.25, 0.125), weight=4.0),
        ),
    ),
    optimizer=dataclasses.replace(recipe.optimizer, warmup=10, decay=110),
    log_every=1 if SMOKE else 5,
)
print(recipe.sampling)

# %% [markdown]
# ## Three minutes

# %%
train(recipe, work / "run")

# %%
log = [json.loads(line) for line in (work / "run" / "log.jsonl").open()]
steps = [event for event in log if "compression" in event]
_, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name in sorted({event["compression"] for event in steps}):
    mine = [event for event in steps if event["compression"] == name]
    x, y = ([event[key] for event in mine] for key in ("step", "answer_loss"))
    axes.plot(x, y, ".-", label=name)
axes.set(xlabel="step", ylabel="loss on answers, nats", yscale="log")
axes.legend()

# %% [markdown]
# ## After

# %%
curve("after", work / "run" / "model")

# %%
for one, other in zip(rows["before"], rows["after"], strict=True):
    name, keep = one["compression"], one["keep"]
    kept = "" if keep is None else f" at {keep:g}"
    print(
        f"{name + kept:18} {100 * one['score']:4.0f} -> {100 * other['score']:4.0f} %"
    )

# %% [markdown]
# The trained model is an ordinary checkpoint: `kvjax.load`, `kvjax eval --model`, and
# transformers read it. [docs/training.md](../docs/training.md) says what else a recipe
# can train: codes, LoRA, DMS, and more.
