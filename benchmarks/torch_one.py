# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""One text under SnapKV with kvpress: `torch_one.py MODEL WORK.json`."""

import json
import sys

import torch
import transformers
from torch_sweep import PRESSES, answer


@torch.inference_mode()
def main() -> None:
    path, file = sys.argv[1:3]
    with open(file, encoding="utf-8") as handle:
        work = json.load(handle)
    torch.set_num_threads(2)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    (group,) = work["groups"]
    prompt = group["prompts"][0] + group["asked"][0]
    press = PRESSES["snapkv"](1 - work["keeps"][0])
    print(answer(model, press, prompt, [], group["new"][0], set()))


if __name__ == "__main__":
    main()
