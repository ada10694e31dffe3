# PyTorch is not a dependency of kvjax; this file runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""torch's scaled dot product attention on a GPU, for `kernels.py`; one JSON line.

Runs in an interpreter of its own: `torch_kernels.py BATCH LENGTH REPEATS`.
"""

import json
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def median_ms(call, repeats: int, calls: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return round(statistics.median(times), 4)


def measure(batch: int, queries: int, length: int, repeats: int, skip=()) -> dict:
    """Milliseconds per backend, for 32 query heads over 8 KV heads of 128."""
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, 32, queries, 128, **kind)
    k, v = (torch.randn(batch, 8, length, 128, **kind) for _ in range(2))
    out = {}
    for name, backend in BACKENDS.items():
        if name in skip:
            continue

        def call():
            how = {"is_causal": queries > 1, "enable_gqa": True}
            return scaled_dot_product_attention(q, k, v, **how)

        try:
            with sdpa_kernel(backend):
                out[name] = median_ms(call, repeats, 20 if queries == 1 else 1)
        except RuntimeError as wrong:  # a backend that does not take the case
            out[name] = str(wrong).strip().splitlines()[0][:200]
    return out


def main() -> None:
    batch, length, repeats = map(int, sys.argv[1:4])
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    results = {
        "decode_ms": measure(batch, 1, length, repeats),
        # The plain product of 128k x 128k logits is not for any memory.
        "prefill_ms": measure(1, length, length, repeats, skip=("math",)),
    }
    print(json.dumps({"torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
