"""What may be known at all of hidden questions behind a cache of the newest tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvjax.eval.tasks import Item, make_task
from kvjax.exact import ceil_share


def recency_bounds(
    header: Mapping[str, Any], n_sink: int, prefix: int = 1
) -> dict[float, float]:
    """By fraction kept, the share of recall items whose record stays whole.

    A model that has not smeared records into later tokens cannot answer the others but
    by guessing. Source: THEORY's ceiling of token retention,
    `accuracy <= r + (1 - r) / |V|`, `r` the share of facts with all their tokens kept.

    Args:
        header: `run.json` of an evaluation with the task `recall` at one length, of a
            model with one token per character.
        n_sink: first tokens that stay beside the newest ones.
        prefix: tokens before the characters of a prompt.
    """
    config = header["config"]
    entry = next(task for task in config["tasks"] if task["name"] == "recall")
    (length,) = config["lengths"]
    task = make_task("recall", **entry["fields"])
    items = task.generate(config["seed"], config["items"], length - prefix)
    return {
        keep: float(np.mean([_stays(item, keep, n_sink, prefix) for item in items]))
        for keep in config["keeps"]
    }


def _stays(item: Item, keep: float, n_sink: int, prefix: int) -> bool:
    record = f"[{item.meta['key']}:{item.meta['value']}]"
    start = prefix + item.context.index(record)
    tokens = prefix + len(item.context)
    slots = int(ceil_share(tokens, keep))
    newest = tokens - (slots - n_sink)
    return start >= newest or start + len(record) <= n_sink or newest <= n_sink
