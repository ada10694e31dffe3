# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""A training step with transformers on torch, for `train.py`; prints one JSON line.

Runs in an interpreter of its own: `torch_train.py MODEL TOKENS.npy REPEATS`.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch
import transformers


def main() -> None:
    path, tokens, repeats = sys.argv[1:4]
    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    ids = torch.from_numpy(np.load(tokens)).long()

    def step() -> float:
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    first, times = step(), []
    for _ in range(int(repeats)):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "step_ms": 1e3 * statistics.median(times),
                "first_loss": first,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
