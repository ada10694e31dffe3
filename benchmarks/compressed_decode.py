"""Time per token of compressed caches against the full one, at a long context.

The caches hold random keys and values: what is timed does not depend on them.
"""

import sys

from common import arguments, decode_ms, large, random_cache, random_model, report

import kvjax


def main() -> int:
    args = arguments(
        __doc__,
        methods=["none", "snapkv", "kivi_4bit"],
        keep=0.1,
        batches=[1],
        length=16384,
        tokens=17,
        layers=12,
        vocab=32000,
        repeats=5,
    )
    config = large(args.layers, args.vocab)
    model = random_model(config)
    results = {}
    for batch in args.batches:
        for name in args.methods:
            c = kvjax.compression(name)
            c = c.with_keep(args.keep) if c.has_budget else c
            cache = random_cache(config, c, batch, args.length, args.tokens)
            ms = decode_ms(model, cache, args.tokens, args.repeats)
            row = {"ms_per_token": round(ms, 3), "cache_bytes": cache.nbytes}
            full = results.get(f"none, batch {batch}", row)
            row["of_full"] = round(ms / full["ms_per_token"], 3)
            results[f"{name}, batch {batch}"] = row
            del cache
    return report("compressed_decode", vars(args), results)


if __name__ == "__main__":
    sys.exit(main())
