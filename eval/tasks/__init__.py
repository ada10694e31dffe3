"""Tasks with known answers, generated or read; a file for each, or for its kind."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from kvjax.eval.tasks.babilong import BABILONG as BABILONG
from kvjax.eval.tasks.base import HELD_OUT as HELD_OUT
from kvjax.eval.tasks.base import TRAIN as TRAIN
from kvjax.eval.tasks.base import Episode as Episode
from kvjax.eval.tasks.base import Item as Item
from kvjax.eval.tasks.base import Measure as Measure
from kvjax.eval.tasks.base import Task as Task
from kvjax.eval.tasks.base import Turn as Turn
from kvjax.eval.tasks.base import stream as stream
from kvjax.eval.tasks.batch import ProblemBatch as ProblemBatch
from kvjax.eval.tasks.chain import Chain as Chain
from kvjax.eval.tasks.choosing import CSQA as CSQA
from kvjax.eval.tasks.choosing import MMLU as MMLU
from kvjax.eval.tasks.dataset import Dataset as Dataset
from kvjax.eval.tasks.fact import Fact as Fact
from kvjax.eval.tasks.gsm8k import GSM8K as GSM8K
from kvjax.eval.tasks.humaneval import HumanEval as HumanEval
from kvjax.eval.tasks.induction import Induction as Induction
from kvjax.eval.tasks.longgenbench import LongGenBench as LongGenBench
from kvjax.eval.tasks.passkey import Passkey as Passkey
from kvjax.eval.tasks.recall import Recall as Recall
from kvjax.eval.tasks.records import STOP as STOP
from kvjax.eval.tasks.records import RecordTask as RecordTask
from kvjax.eval.tasks.retrieval import KeyValue, Lines
from kvjax.eval.tasks.ruler import RULER as RULER
from kvjax.eval.tasks.scbench import SCBENCH as SCBENCH
from kvjax.eval.tasks.variants import variant
from kvjax.messages import nearest, shown

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {
        "recall": Recall,
        "chain": Chain,
        "induction": Induction,
        "batch": ProblemBatch,
        "fact": Fact,
        **RULER,
        "kv_retrieval": variant(KeyValue, "kv_retrieval"),
        "lines": variant(Lines, "lines"),
        "passkey": Passkey,
        **BABILONG,
        **SCBENCH,
        "dataset": Dataset,
        "gsm8k": GSM8K,
        "mmlu": MMLU,
        "csqa": CSQA,
        "humaneval": HumanEval,
        "longgenbench": LongGenBench,
    }
)


def field_names(name: str) -> list[str]:
    """What can be set of the task registered as `name`."""
    return [field.name for field in dataclasses.fields(TASKS[name])]


def make_task(name: str, /, **fields) -> Task:
    """The task registered as `name`, with its fields set.

    Raises:
        ValueError: unknown task or field; the message names the nearest.
    """
    if name not in TASKS:
        raise ValueError(
            f"Unknown task {shown(name)}; expected one of {list(TASKS)}."
            f"{nearest(name, TASKS)}"
        )
    known = field_names(name)
    for field in fields:
        if field not in known:
            raise ValueError(
                f"Task {name!r} has no field {shown(field)}; expected one of "
                f"{known}.{nearest(field, known)}"
            )
    return TASKS[name](**fields)
