"""RULER's thirteen tasks, by their names and with their published parameters."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.eval.tasks.base import Task
from kvjax.eval.tasks.ruler.counting import CommonWords as CommonWords
from kvjax.eval.tasks.ruler.counting import FrequentWords as FrequentWords
from kvjax.eval.tasks.ruler.documents import DocumentQuestions as DocumentQuestions
from kvjax.eval.tasks.ruler.needle import Needle as Needle
from kvjax.eval.tasks.ruler.tracking import VariableTracking as VariableTracking
from kvjax.eval.tasks.variants import variant

_UUIDS = {"key_kind": "uuids", "value_kind": "uuids"}

RULER: Mapping[str, type[Task]] = MappingProxyType(
    {
        name: variant(base, name, **fields)
        for name, base, fields in (
            ("niah_single_1", Needle, {"multi_turn": False}),
            ("niah_single_2", Needle, {"haystack": "essay", "multi_turn": False}),
            (
                "niah_single_3",
                Needle,
                {"haystack": "essay", "value_kind": "uuids", "multi_turn": False},
            ),
            ("niah_multikey_1", Needle, {"haystack": "essay", "keys": 4}),
            ("niah_multikey_2", Needle, {"haystack": "needle"}),
            ("niah_multikey_3", Needle, {"haystack": "needle", **_UUIDS}),
            (
                "niah_multivalue",
                Needle,
                {"haystack": "essay", "values": 4, "multi_turn": False},
            ),
            ("niah_multiquery", Needle, {"haystack": "essay", "keys": 4, "queries": 4}),
            ("vt", VariableTracking, {}),
            ("cwe", CommonWords, {}),
            ("fwe", FrequentWords, {}),
            ("qa_1", DocumentQuestions, {}),
            ("qa_2", DocumentQuestions, {"layout": "hotpotqa"}),
        )
    }
)
