"""SCBench's tasks, generated or read: one context, several questions in turn."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.eval.tasks.base import Task
from kvjax.eval.tasks.retrieval import KeyValue
from kvjax.eval.tasks.ruler.tracking import VariableTracking
from kvjax.eval.tasks.scbench.numbers import MathFind as MathFind
from kvjax.eval.tasks.scbench.published import SharedContext as SharedContext
from kvjax.eval.tasks.scbench.shots import ManyShot as ManyShot
from kvjax.eval.tasks.scbench.strings import PrefixSuffix as PrefixSuffix
from kvjax.eval.tasks.variants import variant

SCBENCH: Mapping[str, type[Task]] = MappingProxyType(
    {
        "scbench": SharedContext,
        **{
            name: variant(base, name, **fields)
            for name, base, fields in (
                ("scbench_kv", KeyValue, {"layout": "row"}),
                ("scbench_prefix_suffix", PrefixSuffix, {}),
                ("scbench_vt", VariableTracking, {"chains": 2, "hops": 2}),
                ("scbench_mf", MathFind, {}),
                ("scbench_many_shot", ManyShot, {}),
            )
        },
    }
)
