"""Many tokens into a cache at once, under methods whose body changes while decoding.

`none` only appends. Blocks of later tokens are encoded (KIVI), pages summarised
(Quest), tokens evicted (H2O) as if they came one by one, and still up to the next full
tail together.
"""

import functools
import sys

import numpy as np
from common import HERE, arguments, large, median_s, random_model, report

import kvjax


def main() -> int:
    args = arguments(
        __doc__,
        name="extend",
        models=["tiny", "large"],
        methods=["none", "kivi_4bit", "quest", "h2o_decode"],
        length=512,
        tokens=512,
        repeats=3,
    )
    results = []
    for name in args.models:
        if name == "tiny":
            path = HERE.parent / "configs/model/kvjax-tiny"
            model, _ = kvjax.load(path, dtype="float32")
        else:
            model = random_model(large())
        draw, vocab = np.random.default_rng(0), model.config.vocab_size
        shape = (1, args.length + args.tokens)
        tokens = draw.integers(3, vocab, shape, dtype=np.int32)
        prompt, later = np.split(tokens, [args.length], axis=1)
        plain = None
        for method in args.methods:
            c = kvjax.compression(method)
            room = {"max_new_tokens": args.tokens}
            _, cache = kvjax.prefill(model, prompt, None, c, **room)
            call = functools.partial(kvjax.extend, model, cache, later)
            seconds = median_s(call, args.repeats)
            plain = plain or seconds
            row = {"model": name, "compression": method, "seconds": seconds}
            row["ratio"] = seconds / plain
            print(row, file=sys.stderr, flush=True)
            results.append(row)
    return report(args.name, vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
