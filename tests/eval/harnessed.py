"""A small model for lm-evaluation-harness, and what it asks."""

import functools

from lm_eval.api.instance import Instance

import kvjax
from kvjax.eval.lm_eval import KvjaxLM
from tests.eval import tiny

SNAPKV = kvjax.compression("snapkv", **{"evict.score.window": 4}).with_keep(0.4)
TEXTS = [
    ("Once there was a small fox. Question: who was it? Answer:", " a fox"),
    ("Once there was a small fox. Question: who was it? Answer:", " the queen"),
    ("Once there was a small fox. Question: who was it? Answer:", "?"),
    ("The old man went home. Question: where did he go? Answer:", " home"),
    ("", "A text without a context"),
    ("Question: a b c Question: d e f ", "g"),
]


@functools.cache
def small():
    return tiny.model(eos_tokens=(2,)), tiny.tokenizer()


def harnessed(c=None, **options) -> KvjaxLM:
    return KvjaxLM(*small(), c, **{"batch": 2, "rolling_from": 16, **options})


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0)  # type: ignore[arg-type]
        for one in arguments
    ]
