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
# # A kernel on a laptop
#
# You will run a TPU kernel without a TPU: decode attention over a cache whose heads
# kept different numbers of tokens. You will see that it equals its specification, that
# what lies in free slots does not matter, that parts merge exactly, and, where libtpu
# is installed, how much of a chip's memory the compiled kernel takes.
#
# **Hardware**: any laptop; two CPU cores are enough. **Run time**: about a minute.
#
# Open it as a notebook with `jupytext --to notebook kernels.py`, or in an editor that
# knows `# %%` cells.

# %%
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from kvjax.pallas_kernels import Partial, merge
from kvjax.pallas_kernels.decode_attention import decode_attention
from kvjax.pallas_kernels.decode_attention.cases import WORKLOADS

SMOKE = bool(os.environ.get("SMOKE"))  # set by the tests: less of everything

# %% [markdown]
# ## A cache with budgets per head
#
# One row, four KV heads, eight query heads. Methods like AdaKV keep many tokens in one
# head and few in another. A kernel reads blocks of slots: dark ones here. A head that
# kept little costs little.

# %%
slots, dim, block = (128, 64, 32) if SMOKE else (512, 64, 64)
lengths = jnp.asarray([[slots, slots // 4 + 3, slots // 2, 0]], jnp.int32)
keys = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(keys[0], (1, 8, 1, dim))
k, v = (jax.random.normal(key, (1, 4, slots, dim)) for key in keys[1:])

read = np.arange(slots // block) < -(-np.asarray(lengths[0])[:, None] // block)
plt.figure(figsize=(6, 1.6))
plt.imshow(read, cmap="Blues", aspect="auto", vmin=-0.2)
plt.xlabel(f"blocks of {block} slots")
plt.ylabel("KV head")
plt.title(f"read: {read.mean():.0%} of the blocks")
plt.show()

# %% [markdown]
# ## The specification, the XLA path, the kernel
#
# `backend="tpu"` with `interpret=True` simulates the chip's memories and copies, with
# race detection, and fills what was never written with NaN. All three return the same
# `Partial(out, lse)`.


# %%
def attend(backend, keys=k, values=v, lengths=lengths, **how):
    """Decode attention on one backend."""
    scale = dim**-0.5
    return decode_attention(
        q, keys, values, lengths, scale=scale, backend=backend, **how
    )


kernel = {"tiles": {"block": block}, "interpret": True}
want = attend("reference")
got = {"xla": attend("xla"), "tpu kernel": attend("tpu", **kernel)}
for name, part in got.items():
    print(f"{name:10} max |out - reference| = {jnp.max(jnp.abs(part.out - want.out))}")

# %%
plt.figure(figsize=(6, 2))
for offset, (name, part) in zip((-0.2, 0.2), got.items(), strict=True):
    error = np.max(np.abs(part.out - want.out), axis=(0, 2, 3))
    plt.bar(np.arange(8) + offset, error, 0.4, label=name)
plt.xlabel("query head (the last two see nothing)")
plt.ylabel("largest error")
plt.legend()
plt.show()

# %% [markdown]
# ## Free slots may hold anything
#
# A cache that evicts leaves old numbers behind, and a cache that was never filled holds
# whatever was in memory. Behind each head's length, NaN changes nothing.

# %%
free = jnp.arange(slots)[None, None, :, None] >= lengths[:, :, None, None]
dirty = attend(
    "tpu", jnp.where(free, jnp.nan, k), jnp.where(free, jnp.nan, v), **kernel
)
print(
    "equal with NaN in free slots:", bool(jnp.all(dirty.out == got["tpu kernel"].out))
)

# %% [markdown]
# ## Parts merge exactly
#
# A compressed body and a tail of new tokens are attended to apart. The log-sum-exp of
# each tells its share: merged, they are softmax attention over both.

# %%
half = slots // 2
body = attend("xla", k[:, :, :half], v[:, :, :half], jnp.minimum(lengths, half))
tail = attend("xla", k[:, :, half:], v[:, :, half:], jnp.maximum(lengths - half, 0))
whole: Partial = merge([body, tail])
print("merged against whole:", jnp.max(jnp.abs(whole.out - want.out)))

# %% [markdown]
# ## What it costs at real size
#
# Decoding is bound by memory: its time is bytes over bandwidth. These are the bytes
# that any implementation has to move for Llama-3.1-8B's heads at 128k tokens.

# %%
loads = {load.name: load.floor_bytes / 2**30 for load in WORKLOADS}
plt.figure(figsize=(6, 0.3 * len(loads) + 0.5))
plt.barh(list(loads), list(loads.values()))
plt.gca().invert_yaxis()
plt.xlabel("GiB per step")
plt.show()

# %% [markdown]
# ## Its memory on a TPU
#
# libtpu holds the TPU's compiler, and compiles for a chip that is not there. It wants
# a process of its own: `make kernels` does this for every op and chip.

# %%
if importlib.util.find_spec("libtpu") is None:
    print("libtpu is not installed here: nothing compiled. `make kernels` installs it")
    print("in an environment of its own and prints this for every op.")
else:
    command = [sys.executable, "-m", "kvjax.pallas_kernels.compile", "--json"]
    command += ["--target", "v5e", "--op", "decode_attention"]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        row = json.loads(line) if line.startswith("{") else {}
        if row.get("status") == "ok" and "starts" not in row:
            vmem = (row["onchip_bytes"] or 0) / 2**20
            print(f"{row['workload']:28} {vmem:.1f} MiB of VMEM, {row['compile_s']} s")

# %% [markdown]
# Next: [docs/kernels](../docs/kernels/index.md) has a page per op; every op takes
# `backend`, `tiles` and `interpret` as this one does.
