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
# # A first look at a compressed cache
#
# You will load the bundled model, ask it something about a text, throw most of its
# KV cache away, and ask again. You will see *which* tokens were kept, and what the
# cache weighs. Then you change one field of the compression and look again.
#
# **Hardware**: any laptop; two CPU cores are enough. **Run time**: under a minute.
#
# Open it as a notebook with `jupytext --to notebook first_look.py`, or in an editor
# that knows `# %%` cells.

# %%
import importlib.resources
import os

import jax.numpy as jnp

import kvjax
from kvjax.eval.report import difference_map, token_map, token_pieces
from kvjax.eval.tasks import make_task

SMOKE = bool(os.environ.get("SMOKE"))  # set by the tests: less of everything

# %% [markdown]
# ## A model and a question
#
# kvjax-tiny reads characters: one token is one character, so a map of tokens is a
# text. It was trained on generated tasks. In `recall`, records like `[KQ=ab3d]` are
# scattered over a text and one of them is asked for.

# %%
folder = importlib.resources.files("kvjax") / "configs" / "model" / "kvjax-tiny"
model, tokenizer = kvjax.load(str(folder), dtype="float32")
config = model.config
print(config.num_layers, "layers,", config.num_kv_heads, "KV heads each")

# %%
task = make_task("recall", keys=4, value_length=4)
item = task.generate(seed=3, count=1, length=200 if SMOKE else 380)[0]
print(item.prompt + "...")
print("expected:", item.answer)

# %% [markdown]
# ## Nothing compressed
#
# The context goes into the cache, then the question, then the reply is decoded. The
# cache is compressed *between* context and question: what to keep has to be decided
# before anybody knows what will be asked.


# %%
def ask(c):
    """The reply, and the cache of the context."""
    context = jnp.asarray([tokenizer.encode(item.context)])
    question = tokenizer.encode(item.question, add_special_tokens=False)
    room = len(question) + task.max_new_tokens
    _, cache = kvjax.prefill(model, context, None, c, max_new_tokens=room)
    logits, asked = kvjax.extend(model, cache, jnp.asarray([question]))
    out = kvjax.generate_from(
        model,
        asked,
        logits[:, -1],
        max_new_tokens=task.max_new_tokens,
        stop_tokens=tokenizer.encode("]", add_special_tokens=False),
    )
    return tokenizer.decode(out.tokens[0, : int(out.lengths[0])]), cache


def look(name, c):
    """Print what a compression costs, and return its token map."""
    reply, cache = ask(c)
    right = task.score(item, reply)
    print(f"{name}: {reply!r}, score {right:g}, {cache.nbytes / 1024:.0f} KiB")
    return token_map(cache, PIECES, title=name)


PIECES = token_pieces(tokenizer, tokenizer.encode(item.context))
look("nothing compressed", kvjax.compression("none"))

# %% [markdown]
# ## A quarter of it
#
# SnapKV keeps what the last tokens of the context attended to. Each line of the map
# is a piece of the text; below it is one row per layer, dark where all KV heads of
# that layer kept the token. The newest tokens are always kept.

# %%
snapkv = kvjax.compression(
    "snapkv", **{"evict.budget.keep": 0.25, "evict.score.window": 16}
)
look("SnapKV, a quarter", snapkv)

# %% [markdown]
# Without the question in sight, attention from the end of the text is a guess at what
# will matter. `random` is the floor that any method has to beat.

# %%
random = kvjax.compression("random", **{"evict.budget.keep": 0.25})
look("random, a quarter", random)

# %% [markdown]
# Two methods in one figure: what both kept, and what only one of them did.

# %%
difference_map(ask(snapkv)[1], ask(random)[1], PIECES, names=("SnapKV", "random"))

# %% [markdown]
# ## Change one field
#
# A compression is a record of independent answers: which score, which unit, which
# budget, in what form the rest is stored. Here the same score keeps twice as much,
# and stores it in 4 bits: another map, about the same bytes.

# %%
half = snapkv.with_keep(0.5)
look("SnapKV, a half", half)

# %%
codes = kvjax.compression(
    "snapkv_kivi", **{"evict.budget.keep": 0.5, "evict.score.window": 16}
)
look("SnapKV, a half, in 4 bits", codes)

# %% [markdown]
# ## All presets
#
# Every published method here is a few lines of YAML over the same fields.

# %%
print(", ".join(kvjax.compressions()))

# %%
print(snapkv)

# %% [markdown]
# Next: `kvjax demo` scores eight compressions on six tasks and draws a report;
# `kvjax eval --help` shows how to run your own.
