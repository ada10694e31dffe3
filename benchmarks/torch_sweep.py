# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""The kvpress side of the sweeps: `torch_sweep.py MODEL WORK.json`.

As kvpress's own pipeline does it: the context is read under the press, batch 1, once
per cell; what is asked follows in one pass; then greedy decoding. The last line that it
prints is JSON: seconds and replies (token ids) of every cell, and the peak of memory.
"""

import contextlib
import json
import resource
import sys
import time

import kvpress
import torch
import transformers

PRESSES = {
    "random": lambda r: kvpress.RandomPress(compression_ratio=r),
    "snapkv": lambda r: kvpress.SnapKVPress(compression_ratio=r),
    "h2o": lambda r: kvpress.ObservedAttentionPress(compression_ratio=r),
    "streaming_llm": lambda r: kvpress.StreamingLLMPress(compression_ratio=r),
    "expected_attention": lambda r: kvpress.ExpectedAttentionPress(compression_ratio=r),
    "knorm": lambda r: kvpress.KnormPress(compression_ratio=r),
    "tova": lambda r: kvpress.TOVAPress(compression_ratio=r),
    "keydiff": lambda r: kvpress.KeyDiffPress(compression_ratio=r),
    "lagkv": lambda r: kvpress.LagKVPress(compression_ratio=r),
    "pyramidkv": lambda r: kvpress.PyramidKVPress(compression_ratio=r),
}


def answer(model, press, context, asked, new: int, stops: set[int]) -> list[int]:
    cache = transformers.DynamicCache()
    with press(model) if press else contextlib.nullcontext():
        out = model(
            input_ids=torch.tensor([context]), past_key_values=cache, logits_to_keep=1
        )
    length, tokens = len(context), []
    for count in range(new):
        if asked:
            at = torch.arange(length, length + len(asked))[None]
            out = model(
                input_ids=torch.tensor([asked]),
                past_key_values=cache,
                position_ids=at,
                logits_to_keep=1,
            )
            length += len(asked)
        tokens.append(int(out.logits[0, -1].argmax()))
        if tokens[-1] in stops or count + 1 == new:
            break
        asked = tokens[-1:]
    return tokens


@torch.inference_mode()
def main() -> None:
    begin = time.perf_counter()
    path, file = sys.argv[1:3]
    with open(file, encoding="utf-8") as handle:
        work = json.load(handle)
    torch.set_num_threads(work.get("threads", 2))
    load = transformers.AutoModelForCausalLM.from_pretrained
    kinds = {"eager" if name == "h2o" else "sdpa" for name in work["methods"]}
    models = {
        kind: load(path, dtype=torch.float32, attn_implementation=kind).eval()
        for kind in sorted(kinds | {"sdpa"})
    }
    cells = [(name, keep) for name in work["methods"] for keep in work["keeps"]]
    start, out = time.perf_counter(), []
    for group in work["groups"]:
        for name, keep in [("none", 1.0), *cells]:
            model = models["eager" if name == "h2o" else "sdpa"]  # it reads the weights
            press = None
            if name != "none":
                press = PRESSES[name](1 - keep)
                for field, value in work.get("fields", {}).get(name, {}).items():
                    setattr(press, field, value)
            first = time.perf_counter()
            replies = [
                answer(model, press, context, asked, new, set(work["stops"]))
                for context, asked, new in zip(
                    group["prompts"], group["asked"], group["new"], strict=True
                )
            ]
            seconds = time.perf_counter() - first
            cell = {"group": group["name"], "compression": name, "keep": keep}
            out.append({**cell, "seconds": seconds, "replies": replies})
            print(f"{group['name']} {name} {keep} {seconds:.1f} s", file=sys.stderr)
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvpress": getattr(kvpress, "__version__", ""),
        "load_s": start - begin,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "cells": out, **about}))


if __name__ == "__main__":
    main()
