"""A model trained to tolerate eviction, in transformers, under kvpress's SnapKV.

The trained model and the one that it was trained from answer the same items on both
sides: uncompressed, where all tokens should be the same here and there, and under
SnapKV of either library, which says whether what training gained is the model's own.
`KVJAX_TORCH_PYTHON` names kvpress's interpreter.
"""

import pathlib
import sys
import tempfile
from typing import Any

from common import arguments, report
from common_sweep import ours, planned, theirs
from real_vs_kvpress import compared

from kvjax.models.bundled import model_directory

WINDOW = 16
"""Queries of SnapKV, as in the training."""


def main() -> int:
    args = arguments(
        __doc__,
        models=["smollm2", "runs/smollm2_tolerant/model"],
        keeps=[0.25],
        tasks=["niah_multikey_1", "niah_multivalue"],
        length=512,
        visibility=["query_agnostic"],
        items=16,
        essays="",
    )
    fields = {"essays": args.essays} if args.essays else {}
    results: dict[str, Any] = {}
    for model in args.models:
        tree = {
            "model": model,
            "compressions": ["snapkv"],
            "overrides": {"snapkv": {"evict.score.window": WINDOW}},
            "keeps": args.keeps,
            "tasks": [{"name": name, "fields": fields} for name in args.tasks],
            "lengths": [args.length],
            "visibility": args.visibility,
            "items": args.items,
            "batch": args.items,
            "share_passes": True,
        }
        path = model_directory(model)
        with tempfile.TemporaryDirectory() as folder:
            where = pathlib.Path(folder)
            made = planned(path, tree)
            found: dict[str, Any] = ours(path, tree, where, ["cold"])
            presses = {"snapkv": {"window_size": WINDOW}}
            other = theirs(
                path, made, args.items, ["snapkv"], args.keeps, where, presses
            )
            found["cells"] = compared(made, where / "cold", other.pop("cells"))
            results[pathlib.Path(model).parent.name or model] = found | other
    about = {**vars(args), "essays": pathlib.Path(args.essays).name}
    about["models"] = list(results)
    return report("tolerant_in_kvpress", about, results, seed=1)


if __name__ == "__main__":
    sys.exit(main())
