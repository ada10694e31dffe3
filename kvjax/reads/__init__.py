"""What does each decode step look at?"""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.reads._all import All as All
from kvjax.reads._exact_topk import ExactTopK as ExactTopK
from kvjax.reads._infllm import InfLLM as InfLLM
from kvjax.reads._quest import Quest as Quest
from kvjax.reads._retroinfer import RetroInfer as RetroInfer
from kvjax.reads._shadowkv import ShadowKV as ShadowKV
from kvjax.reads.base import AbstractBudgeted as AbstractBudgeted
from kvjax.reads.base import AbstractRead as AbstractRead

READS: Mapping[str, type[AbstractRead]] = MappingProxyType(
    {
        "all": All,
        "quest": Quest,
        "infllm": InfLLM,
        "shadowkv": ShadowKV,
        "retroinfer": RetroInfer,
        "exact_topk": ExactTopK,
    }
)
