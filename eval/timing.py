"""Wall time with compilation taken out, from JAX's own monitoring events."""

import dataclasses
import time
from collections.abc import Callable

import jax

_COMPILE = "/jax/core/compile/"  # tracing, lowering and backend compilation
_spans: list[tuple[float, float]] = []
_listening: list[bool] = []


@dataclasses.dataclass(frozen=True)
class Timed[T]:
    """The result of a call, finished on the device, and where its time went."""

    value: T
    run_s: float
    compile_s: float


def timed[T](call: Callable[[], T]) -> Timed[T]:
    """Run `call` to the end; compilation is measured apart from running.

    Nothing may still be running on the device when it starts. Spans of nested
    compilations overlap, so the length of their union counts.
    """
    if not _listening:
        jax.monitoring.register_event_time_span_listener(_listen)
        _listening.append(True)
    _spans.clear()
    start = time.perf_counter()
    value = jax.block_until_ready(call())
    wall = time.perf_counter() - start
    compiling = union(_spans)
    _spans.clear()
    return Timed(value, max(wall - compiling, 0.0), compiling)


def union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def _listen(event: str, start_time: float, end_time: float, **_: str | int) -> None:
    if event.startswith(_COMPILE):
        _spans.append((start_time, end_time))
