"""Metrics of published benchmarks: how right one reply is, in [0, 1]."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from kvjax.eval.metrics import (
    boxed,
    infinitebench,
    longbench,
    longbench_v2,
    loogle,
    ruler,
)
from kvjax.eval.metrics.words import Metric as Metric
from kvjax.messages import nearest, shown

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        **ruler.METRICS,
        **longbench.METRICS,
        **longbench_v2.METRICS,
        **infinitebench.METRICS,
        **loogle.METRICS,
        **boxed.METRICS,
    }
)
"""All of them, by the names that `metric` takes."""

FAMILIES: Mapping[str, Callable[[str], str | None]] = MappingProxyType(
    {
        "ruler": ruler.chosen,
        "longbench": longbench.chosen,
        "longbench_v2": longbench_v2.chosen,
        "infinitebench": infinitebench.chosen,
        "loogle": loogle.chosen,
        "aime25": boxed.chosen,
        "math500": boxed.chosen,
    }
)
"""Benchmarks: from the task of a row to the name of its metric."""

_NAMELESS = ("longbench_v2", "aime25", "math500")
"""Those whose rows name no task, so that only their own name tells them."""

_SPELLED = {"infinite_bench": "infinitebench", "longbench_e": "longbench"}
AUTO = "auto"


def family_of(path: str) -> str | None:
    """The benchmark that a path or a hub id names: `simonjegou/ruler`, `LongBench-v2`.

    Raises:
        ValueError: it is ZeroSCROLLS, whose answers are not public.
    """
    for part in reversed(path.replace("\\", "/").split("/")):
        name = part.split(".")[0].lower().replace("-", "_")
        name = _SPELLED.get(name, name)
        if name == "zero_scrolls":
            raise ValueError(
                "ZeroSCROLLS has no public answers (its site scores what is sent in), "
                "so nothing can be scored here. For data that has some, give `metric`."
            )
        if name in FAMILIES:
            return name
    return None


def metric_names(metric: str, path: str, tasks: Iterable[str]) -> dict[str, str]:
    """The metric of each task that occurs in a data set.

    Args:
        metric: a name of `METRICS` for all of them, one of `FAMILIES`, or `auto`: the
            family that the path names, or the only one that has all the tasks.
        path: of the data.
        tasks: what its rows are of, an empty text where they do not say; none: the
            name and the path alone are checked.

    Raises:
        ValueError: no such metric, or none can be chosen; lists them.
    """
    tasks = list(dict.fromkeys(tasks))
    if metric in METRICS:
        return dict.fromkeys(tasks, metric)
    if metric != AUTO and metric not in FAMILIES:
        known = [AUTO, *FAMILIES, *METRICS]
        raise ValueError(
            f"`metric` must be one of {known}; got {shown(metric)}."
            f"{nearest(metric, known)}"
        )
    family = family_of(path) if metric == AUTO else metric
    if not tasks:
        return {}
    if family is None:
        fit = [name for name in FAMILIES if name not in _NAMELESS and _has(name, tasks)]
        family = fit[0] if len(fit) == 1 else None
    found = {task: FAMILIES[family](task) for task in tasks} if family else {}
    made = {task: name for task, name in found.items() if name}
    if not family or len(made) < len(tasks):
        unknown = [task for task in tasks if task not in made]
        what = f"tasks of {family!r}" if family else "tasks"
        raise ValueError(
            f"No metric is known for {what} named {shown(unknown)}. Give `metric`: a "
            f"benchmark ({', '.join(FAMILIES)}) or a metric ({', '.join(METRICS)})."
        )
    return made


def _has(family: str, tasks: Sequence[str]) -> bool:
    try:
        return all(FAMILIES[family](task) for task in tasks)
    except ValueError:  # known, and refused
        return True


REPLIES: Mapping[str, Callable[[Sequence[str]], str]] = MappingProxyType(
    {
        "string_match_all": ", ".join,
        "running_values": ", ".join,
        "correct_answer_letter": lambda answers: f"{longbench_v2.PHRASE}({answers[0]})",
        "boxed": lambda answers: f"\\boxed{{{answers[0]}}}",
        "kvpress_aime25": lambda answers: f"\\boxed{{{answers[0]}}}",
        "kvpress_math500": lambda answers: f"\\boxed{{{answers[0]}}}",
    }
)
"""Perfect replies, where these are not the first reference as it stands."""


def perfect(metric: str, answers: Sequence[str]) -> str:
    """A reply that is fully right."""
    return REPLIES.get(metric, lambda texts: texts[0])(answers)
