"""Who gets how many slots? Exact integers, decided once, at the edge."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.budgets._ada import AdaKV as AdaKV
from kvjax.budgets._ada_global import AdaKVGlobal as AdaKVGlobal
from kvjax.budgets._cake import Cake as Cake
from kvjax.budgets._lava import Lava as Lava
from kvjax.budgets._pyramid import Pyramid as Pyramid
from kvjax.budgets._retrieval import RetrievalHeads as RetrievalHeads
from kvjax.budgets.base import AbstractBudget as AbstractBudget
from kvjax.budgets.base import Uniform as Uniform

BUDGETS: Mapping[str, type[AbstractBudget]] = MappingProxyType(
    {
        "uniform": Uniform,
        "pyramid": Pyramid,
        "ada": AdaKV,
        "ada_global": AdaKVGlobal,
        "cake": Cake,
        "lava": Lava,
        "retrieval_heads": RetrievalHeads,
    }
)
