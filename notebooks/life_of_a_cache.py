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
# # The life of a cache
#
# You will read a text in chunks, in memory that does not grow with it; save the cache
# and load it; ask five questions of it at once; put it into the host's memory; and plan
# what a larger one would take on a chip that you do not have. Every step shows bytes.
#
# `kvjax-tiny-dms` was trained to say which tokens it can do without. **Hardware**: any
# laptop; two CPU cores are enough. **Run time**: two minutes.

# %%
import importlib.resources
import tempfile

import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.eval.report import token_map, token_pieces
from kvjax.eval.report.style import new_figure
from kvjax.eval.tasks import make_task

folder = importlib.resources.files("kvjax") / "configs" / "model" / "kvjax-tiny-dms"
model, tokenizer = kvjax.load(str(folder), dtype="float32")
bytes_of = {}


def note(step, cache):
    """Remember and show what a cache takes, on the device and on the host."""
    held = cache.nbytes - cache.host_nbytes, cache.host_nbytes
    bytes_of[step] = held
    print(
        f"{step}: {held[0] / 1024:.0f} KiB on the device, {held[1] / 1024:.0f} beside"
    )


# %% [markdown]
# ## A text and five questions
#
# Records such as `[52:8nzw]` are scattered over the text, and five are asked for.

# %%
task = make_task("recall", value_length=4)
episode = task.episodes(2, 1, 640, turns=5)[0]
text = jnp.asarray([tokenizer(episode.context)["input_ids"]])
print(episode.context[:200], "...")
print(text.shape[1], "tokens;", [turn.question for turn in episode.turns])

# %% [markdown]
# ## Read in bounded memory
#
# `every_chunk` reads 128 tokens at a time. Behind each chunk the heads of a layer keep
# the best of what they hold, 160 tokens on average, however long the text is. No score
# sees a question: none has been asked yet. The map says which characters stayed, and in
# how many heads.

# %%
whole = kvjax.compression("none")
_, everything = kvjax.prefill(model, text, None, whole, max_new_tokens=0)
note("all tokens", everything)
c = kvjax.compression(
    "dms",
    prefill="dense",
    schedule={"type": "every_chunk", "size": 128},
    **{"evict.budget.slots": 160},
)
_, cache = kvjax.prefill(model, text, None, c, max_new_tokens=0)
note("read in chunks", cache)

# %%
pieces = token_pieces(tokenizer, np.asarray(text[0]).tolist())
token_map(cache, pieces, title="kept, by layer")

# %% [markdown]
# ## On the disk, and back
#
# What comes back is bit for bit what was saved, of this model or not at all: a cache
# knows the weights that made it.

# %%
directory = tempfile.mkdtemp() + "/document"
cache.save(directory)
document = kvjax.load_cache(directory, model)
note("loaded", document)

# %% [markdown]
# ## Five questions at once
#
# `fork` makes five rows that go on from the one; the text is held once for all.

# %%
said = [turn.question + turn.prefix for turn in episode.turns]
asked = [tokenizer.encode(text, add_special_tokens=False) for text in said]
width = max(map(len, asked))
tokens = np.array([row + [0] * (width - len(row)) for row in asked])
lengths = np.array([len(row) for row in asked])


def answers(cache):
    """What the model replies to each question."""
    rows = cache.fork(len(asked), max_new_tokens=width + 8)
    logits, rows = kvjax.extend(model, rows, tokens, lengths, last=True)
    out = kvjax.generate_from(model, rows, logits[:, 0], max_new_tokens=6)
    return rows, [tokenizer.decode(row) for row in np.asarray(out.tokens)]


rows, found = answers(document)
for turn, reply in zip(episode.turns, found, strict=True):
    print(turn.question.strip(), reply, "right" if reply == turn.answer else "wrong")
note("five forks", rows)

# %% [markdown]
# ## In the host's memory
#
# The body moves; positions and what rows add stay. A step fetches the blocks that it
# reads. The answers are the same. (On a CPU both memories are one: nothing is copied.)

# %%
there = document.placed("host")
rows, moved = answers(there)
print("same answers:", moved == found)
note("five forks, body on the host", rows)


# %%
def bars():
    """Bytes of every step."""
    figure = new_figure(6.4, 2.9)
    axes = figure.add_subplot()
    device, host = np.array(list(bytes_of.values())).T / 1024
    axes.barh(list(bytes_of), device, label="device")
    axes.barh(list(bytes_of), host, left=device, color="#E69F00", label="host")
    axes.invert_yaxis()
    axes.set_xlabel("KiB, allocated here on a CPU")
    axes.legend(frameon=False)
    return figure


bars()

# %% [markdown]
# ## And on a chip that is not here?
#
# Compressions of a model of another size, for a v5e. Bytes of weights and
# caches are the library's own shapes; temporaries are formulas. Nothing runs.

# %%
plan = kvjax.plan(
    "Qwen/Qwen2.5-0.5B",
    ["none", "kivi_4bit", "snapkv", "snapkv_kivi"],
    context=32_768,
    batch=24,
    device="v5e",
)
print(plan)

# %%
plan.plot()
