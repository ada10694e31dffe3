"""How valuable is a token? One scorer per published idea."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.scorers._attention import H2O as H2O
from kvjax.scorers._attention import TOVA as TOVA
from kvjax.scorers._attention import SnapKV as SnapKV
from kvjax.scorers._cake import Cake as Cake
from kvjax.scorers._expected_attention import ExpectedAttention as ExpectedAttention
from kvjax.scorers._keys import KeyDiff as KeyDiff
from kvjax.scorers._keys import KNorm as KNorm
from kvjax.scorers._kvzip import KVzip as KVzip
from kvjax.scorers._lagkv import LagKV as LagKV
from kvjax.scorers._lava import Lava as Lava
from kvjax.scorers._learned import Retention as Retention
from kvjax.scorers._oracle import Oracle as Oracle
from kvjax.scorers._positional import Random as Random
from kvjax.scorers._positional import StreamingLLM as StreamingLLM
from kvjax.scorers._rkv import RKV as RKV
from kvjax.scorers._triattention import TriAttention as TriAttention
from kvjax.scorers._values import CUR as CUR
from kvjax.scorers._values import CriticalKV as CriticalKV
from kvjax.scorers.base import AbstractScorer as AbstractScorer

SCORERS: Mapping[str, type[AbstractScorer]] = MappingProxyType(
    {
        "random": Random,
        "streaming_llm": StreamingLLM,
        "knorm": KNorm,
        "keydiff": KeyDiff,
        "snapkv": SnapKV,
        "cake": Cake,
        "lava": Lava,
        "tova": TOVA,
        "h2o": H2O,
        "expected_attention": ExpectedAttention,
        "critical_kv": CriticalKV,
        "lagkv": LagKV,
        "cur": CUR,
        "retention": Retention,
        "kvzip": KVzip,
        "oracle": Oracle,
        "rkv": RKV,
        "triattention": TriAttention,
    }
)
