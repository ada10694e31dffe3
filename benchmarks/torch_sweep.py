# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""The kvpress side of `sweep_vs_kvpress.py`: `torch_sweep.py MODEL WORK.json`.

As kvpress's own pipeline does it: the context is read under the press, batch 1, once
per cell; the question follows token by token in one pass; then greedy decoding.
"""

import contextlib
import json
import sys
import time

import kvpress
import torch
import transformers

PRESSES = {
    "random": lambda r: kvpress.RandomPress(compression_ratio=r),
    "snapkv": lambda r: kvpress.SnapKVPress(compression_ratio=r, window_size=16),
    "h2o": lambda r: kvpress.ObservedAttentionPress(compression_ratio=r),
    "streaming_llm": lambda r: kvpress.StreamingLLMPress(compression_ratio=r),
    "expected_attention": lambda r: kvpress.ExpectedAttentionPress(compression_ratio=r),
    "knorm": lambda r: kvpress.KnormPress(compression_ratio=r),
    "tova": lambda r: kvpress.TOVAPress(compression_ratio=r),
    "keydiff": lambda r: kvpress.KeyDiffPress(compression_ratio=r),
    "lagkv": lambda r: kvpress.LagKVPress(compression_ratio=r),
}


def answer(model, press, context, question, new: int, stops: set[int]) -> list[int]:
    cache = transformers.DynamicCache()
    with press(model) if press else contextlib.nullcontext():
        model.model(input_ids=torch.tensor([context]), past_key_values=cache)
    at = torch.arange(len(context), len(context) + len(question))[None]
    tokens, ids = [], torch.tensor([question])
    for _ in range(new):
        out = model(input_ids=ids, past_key_values=cache, position_ids=at)
        tokens.append(int(out.logits[0, -1].argmax()))
        if tokens[-1] in stops:
            break
        ids, at = torch.tensor([[tokens[-1]]]), at[:, -1:] + 1
    return tokens


@torch.inference_mode()
def main() -> None:
    path, file = sys.argv[1:3]
    with open(file, encoding="utf-8") as handle:
        work = json.load(handle)
    torch.set_num_threads(2)
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = {
        kind: load(path, dtype=torch.float32, attn_implementation=kind).eval()
        for kind in ("sdpa", "eager")
    }
    pairs = list(zip(work["prompts"], work["questions"], strict=True))
    cells = [(name, keep) for name in work["methods"] for keep in work["keeps"]]
    start = time.perf_counter()
    for name, keep in [("none", 1.0), *cells]:
        model = models["eager" if name == "h2o" else "sdpa"]  # h2o reads the weights
        press = None if name == "none" else PRESSES[name](1 - keep)
        for context, question in pairs:
            answer(model, press, context, question, work["new"], set(work["stops"]))
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"seconds": time.perf_counter() - start, **about}))


if __name__ == "__main__":
    main()
