# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""What transformers computes with the models in GGUF files.

    python tests/gguf_reference.py OUT.npz FILE ...

OUT.npz has for each file's stem `tokens [1, T]` and `logits [1, T, V]`, float32.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
arrays = {}
for path in map(pathlib.Path, sys.argv[2:]):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, 24))
    with torch.no_grad():
        logits = model.eval()(torch.tensor(tokens)).logits
    arrays[f"{path.stem}/tokens"] = tokens.astype(np.int32)
    arrays[f"{path.stem}/logits"] = logits.numpy()
np.savez(sys.argv[1], **arrays)
