"""An evaluation sweep: kvjax against the same sweep with kvpress, both on CPU.

kvjax runs the harness twice, in processes of their own that share a compilation cache
on disk: the first starts cold, the second warm. kvpress answers `--torch_items` items
of the same cells, `none` and `random` among them, batch 1, and is scaled to all items.
`KVJAX_TORCH_PYTHON` names its interpreter.
"""

import pathlib
import sys
import tempfile

from common import HERE, arguments, report
from common_sweep import ours, planned, theirs

METHODS = ["snapkv", "h2o", "streaming_llm", "expected_attention", "knorm", "tova"]


def main() -> int:
    args = arguments(
        __doc__,
        model="kvjax-tiny",
        methods=[*METHODS, "keydiff", "lagkv"],
        keeps=[0.5, 0.25, 0.125],
        items=100,
        batch=50,
        length=512,
        torch_items=10,
    )
    tree = {
        "compressions": args.methods,
        "keeps": args.keeps,
        "tasks": [{"name": "recall"}],
        "lengths": [args.length],
        "items": args.items,
        "batch": args.batch,
        "window": 16,
        "share_passes": True,
    }
    path = str(HERE.parent / "configs/model" / args.model)
    results: dict = {"cells": 1 + (1 + len(args.methods)) * len(args.keeps)}
    with tempfile.TemporaryDirectory() as folder:
        where = pathlib.Path(folder)
        results |= ours(path, tree, where)
        found = theirs(
            path,
            planned(path, tree),
            args.torch_items,
            ["random", *args.methods],
            args.keeps,
            where,
            {"snapkv": {"window_size": 16}},
        )
    del found["cells"]  # replies are compared by `real_vs_kvpress.py`
    results |= found
    for name in ("cold", "warm"):
        ratio = found["kvpress_scaled_s"] / results[f"kvjax_{name}_s"]
        results[f"ratio_{name}"] = round(ratio, 2)
    return report("sweep_vs_kvpress", vars(args), results, seed=1)


if __name__ == "__main__":
    sys.exit(main())
