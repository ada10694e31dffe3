"""What may be known at all behind StreamingLLM when the question was hidden."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import kvjax
from kvjax.eval.tasks import make_task
from kvjax.exact import ceil_share

PREFIX = 1
"""Tokens before the characters of a prompt; kvjax-tiny has one token per character."""


def streaming_bounds(header: Mapping[str, Any]) -> dict[float, float]:
    """By fraction kept, the share of recall items whose record stays whole.

    A model that has not smeared records into later tokens cannot answer the others but
    by guessing four characters of 36. Source: THEORY's ceiling of token retention,
    `accuracy <= r + (1 - r) / |V|`, `r` the share of facts with all their tokens kept.

    Args:
        header: `run.json` of an evaluation with the task `recall` at one length.
    """
    config = header["config"]
    n_sink = kvjax.compression("streaming_llm").evict.score.n_sink  # type: ignore
    entry = next(task for task in config["tasks"] if task["name"] == "recall")
    (length,) = config["lengths"]
    task = make_task("recall", **entry["fields"])
    items = task.generate(config["seed"], config["items"], length - PREFIX)
    return {
        keep: float(np.mean([_stays(item, keep, n_sink) for item in items]))
        for keep in config["keeps"]
    }


def _stays(item: Any, keep: float, n_sink: int) -> bool:
    record = f"[{item.meta['key']}:{item.meta['value']}]"
    start = PREFIX + item.context.index(record)
    tokens = PREFIX + len(item.context)
    slots = int(ceil_share(tokens, keep))
    newest = tokens - (slots - n_sink)
    return start >= newest or start + len(record) <= n_sink or newest <= n_sink
