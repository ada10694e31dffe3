"""Seconds to compile, for few layers and for many: programs do not grow with depth.

Each figure is CPU time of the first call in a process of its own, caches off, so that
what other programs compiled before does not help.
"""

import json
import subprocess
import sys
import time

import numpy as np
from common import arguments, report
from flax import nnx

import kvjax
from kvjax.models import Decoder, DecoderConfig
from kvjax.rope import Rope

CALLS = ("prefill", "generate", "extend", "simulate")


def model_of(layers: int, width: int, windows: bool) -> Decoder:
    """Random weights; with `windows` five of six layers slide, as in Gemma 3."""
    pattern = [64 if layer % 6 != 5 else None for layer in range(layers)]
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=layers,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        rope=Rope(head_dim=32),
        local_rope=Rope(head_dim=32, theta=1e6) if windows else None,
        windows=tuple(pattern) if windows else (),
        max_positions=4096,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def measure(layers: int, width: int, method: str, windows: bool) -> dict[str, float]:
    """CPU seconds of each first call."""
    model, c = model_of(layers, width, windows), kvjax.compression(method)
    draw = np.random.default_rng(0)
    prompt = draw.integers(0, 512, (1, 256), dtype=np.int32)
    later = draw.integers(0, 512, (1, 32), dtype=np.int32)
    whole = np.concatenate([prompt, later], axis=1)
    lengths = np.array([256], np.int32)
    spent = {}

    def timed(name: str, call):
        start = time.process_time()
        out = call()
        np.asarray(out[0] if isinstance(out, tuple) else out)
        spent[name] = time.process_time() - start
        return out

    first = timed("prefill", lambda: kvjax.prefill(model, prompt, None, c))
    logits, cache = first
    timed("generate", lambda: kvjax.generate_from(model, cache, logits))
    timed("extend", lambda: kvjax.extend(model, cache, later))
    timed("simulate", lambda: kvjax.simulate(model, whole, None, lengths, c))
    return spent


def main() -> int:
    args = arguments(
        __doc__,
        name="compile_time",
        layers=[4, 32],
        width=192,
        methods=[
            "none",
            "snapkv",
            "adakv_snapkv",
            "kivi_4bit",
            "h2o_decode",
            "pyramidkv",
            "quest",
        ],
        only="",
    )
    if args.only:  # a process for one figure
        layers, method, windows = args.only.split(",")
        spent = measure(int(layers), args.width, method, bool(int(windows)))
        print(json.dumps(spent))
        return 0
    results = []
    for method in args.methods:
        for windows in (False, True) if method in ("none", "snapkv") else (False,):
            row = {"compression": method, "windows": windows}
            # A pattern of windows is a period of six: the few have all of it, too.
            sizes = [max(n, 12) for n in args.layers] if windows else args.layers
            for layers in sizes:
                given = f"{layers},{method},{int(windows)}"
                command = [sys.executable, __file__, "--only", given]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                row[f"layers_{layers}"] = json.loads(done.stdout.splitlines()[-1])
            few, many = (row[f"layers_{n}"] for n in (sizes[0], sizes[-1]))
            row["ratio"] = {call: many[call] / few[call] for call in CALLS}
            print(row, file=sys.stderr, flush=True)
            results.append(row)
    return report(args.name, vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
