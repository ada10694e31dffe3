# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""Greedy decoding with transformers on torch, for `decode.py`; prints one JSON line.

Runs in an interpreter of its own: `torch_decode.py MODEL PROMPT.npy NEW REPEATS`.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch
import transformers


def generate(model, ids, new: int, static: bool):
    """Seconds per step of the loop, prefill aside, and the tokens."""
    shape = ids.shape[1] + new
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=shape)
    else:
        cache = transformers.DynamicCache(config=model.config)
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
    start = time.perf_counter()
    for step in range(new - 1):
        at = torch.tensor([ids.shape[1] + step])
        out = model(
            tokens[-1],
            past_key_values=cache,
            use_cache=True,
            position_ids=at[None].expand(len(ids), 1),
        )
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
    took = (time.perf_counter() - start) / (new - 1)
    return took, torch.cat(tokens, 1)


@torch.inference_mode()
def main() -> None:
    path, prompt, new, repeats = sys.argv[1:5]
    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32
    ).eval()
    ids = torch.from_numpy(np.load(prompt)).long()
    results = {}
    for name in ("dynamic", "static"):
        try:
            generate(model, ids, 3, name == "static")
            runs = [
                generate(model, ids, int(new), name == "static")
                for _ in range(int(repeats))
            ]
        except Exception as wrong:  # one kind of cache is enough
            results[name] = {"error": f"{type(wrong).__name__}: {wrong}"[:300]}
            continue
        results[name] = {
            "ms_per_token": 1e3 * statistics.median(run[0] for run in runs),
            "tokens": runs[0][1].tolist(),
        }
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()
