# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Runs all of kvpress' KVzip, and writes what it scores and keeps to an npz file.

    python tests/reference/kvpress_kvzip.py OUT.npz MODEL

The random Llama of `tests/kvpress_reference.py` is saved in the folder MODEL. Only the
tokenizer is made up: whatever is asked for a replay is `ask`. Layout of OUT.npz:

    ask, tokens                      token ids
    scores                           [L, K, S]
    kept/layerL/headK                positions kept, half of those of all layers
"""

import pathlib
import sys

# The script's own folder has modules named like those of the standard library.
sys.path[0] = str(pathlib.Path(__file__).parent.parent)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from kvpress import KVzipPress  # noqa: E402
from kvpress_reference import make_model  # noqa: E402
from transformers import DynamicCache  # noqa: E402

ASK, LENGTH, CHUNK = [17, 4, 311], 150, 64


class Tokenizer:
    """What is asked in any words is `ASK`."""

    def encode(self, text, **how):
        """The ids of every text."""
        return torch.as_tensor([ASK])


def main() -> None:
    """Command line; see the module's docstring."""
    torch.use_deterministic_algorithms(True)
    model = make_model().float().eval()
    model.save_pretrained(sys.argv[2])
    tokens = np.random.default_rng(5).integers(0, model.config.vocab_size, LENGTH)
    press = KVzipPress(0.5, chunk_size=CHUNK)
    press._context_ids, press._cache = torch.as_tensor(tokens)[None], DynamicCache()
    press._suffix_ids = torch.zeros((1, 0), dtype=torch.long)
    with torch.no_grad():
        model(press._context_ids, past_key_values=press._cache)
        press._perform_kvzip_compression(model, Tokenizer())
    out = {"ask": np.asarray(ASK), "tokens": tokens.astype(np.int32)}
    out["scores"] = press.score_val[:, 0].numpy()
    for n, layer in enumerate(model.model.layers):
        _, heads, positions = layer.self_attn.masked_key_indices
        for head in range(model.config.num_key_value_heads):
            dropped = positions[heads == head].numpy()
            kept = np.setdiff1d(np.arange(LENGTH), dropped)
            out[f"kept/layer{n}/head{head}"] = kept
    np.savez_compressed(sys.argv[1], **out)


if __name__ == "__main__":
    main()
