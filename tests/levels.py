"""Which tests a run takes, and the order in which its workers get them.

`fast` is `make test`: nothing that is marked slow or runs in an interpreter. `ci` is
what `.ci/run` takes. `all` is `make test-all`, and pytest by itself. Of a test marked
`sweep(m, n)` there are m cases in `fast` and n in `ci`, of each `kind=` if it has one.
Of a test whose cases would take `LONG` seconds together, one in `TURNS`. Both are drawn
by the hash of the commit's tree: in a few commits all of them are run, but of those
with `sweep(0, 0)`, which only `all` takes.
"""

import collections
import hashlib
import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMES = ROOT / "tests" / "times.json"
LEVELS = ("fast", "ci", "all")
SEED = "KVJAX_TREE"
USED = pytest.StashKey[float]()
LONG = 2.0
"""Recorded processor seconds from which a test's cases take turns."""
TURNS = {"fast": 10, "ci": 6}
"""Commits, on average, in which a case of a long test is run once, by level."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvjax")
    group.addoption("--level", choices=LEVELS, default="all", help=__doc__)
    group.addoption("--record", action="store_true", help=f"write {TIMES.name}")


def tree() -> str:
    """Hash of the commit's tree, or what `KVJAX_TREE` says."""
    if SEED not in os.environ:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD^{tree}"]
        try:
            found = subprocess.run(command, capture_output=True, text=True).stdout
        except OSError:
            found = ""
        os.environ[SEED] = found.strip() or "no-git"
    return os.environ[SEED]


def pytest_report_header(config: pytest.Config) -> str:
    level = config.getoption("--level")
    drawn = "" if level == "all" else f", sweeps drawn by {SEED}={tree()}"
    return f"kvjax: level {level}{drawn}"


def function_of(nodeid: str) -> str:
    """The test without its parameters."""
    return nodeid.split("[")[0]


def beyond(item: pytest.Item, level: str) -> bool:
    """Whether a mark of the test keeps it from a level."""
    marks = ("slow", "interpret") if level == "fast" else ()
    return any(item.get_closest_marker(mark) is not None for mark in marks)


def lot(seed: str, name: str) -> bytes:
    """The lot of a test or a case: drawn anew with every tree."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def drawn(items: list[pytest.Item], seed: str, level: str) -> list[pytest.Item]:
    """What a level takes of all tests, in their order."""
    functions = collections.defaultdict(list)
    for item in items:
        if not beyond(item, level):
            functions[function_of(item.nodeid)].append(item)
    known = times()
    chosen = set()
    for function, every in functions.items():
        every.sort(key=lambda item: lot(seed, item.nodeid))
        cases = swept(every, level)
        if known.get(function, 0.0) * len(cases) >= LONG:
            turns = TURNS[level]
            first = int.from_bytes(lot(seed, function)[:4]) % turns
            cases = cases[first::turns]
        chosen.update(cases)
    return [item for item in items if item in chosen]


def swept(cases: list[pytest.Item], level: str) -> list[pytest.Item]:
    """The first cases of each kind, as many as a sweep gives the level."""
    count, taken = collections.Counter[str | None](), []
    for item in cases:
        mark = item.get_closest_marker("sweep")
        if mark is not None:
            kind = mark.kwargs.get("kind")
            if count[kind] >= mark.args[LEVELS.index(level)]:
                continue
            count[kind] += 1
        taken.append(item)
    return taken


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    level = str(config.getoption("--level"))
    if level != "all":
        chosen = drawn(items, tree(), level)
        taken = set(chosen)
        config.hook.pytest_deselected(items=[i for i in items if i not in taken])
        items[:] = chosen
    longest_first(items)


def times() -> dict[str, float]:
    """Recorded processor seconds of a test, the mean of its cases."""
    return json.loads(TIMES.read_text()) if TIMES.exists() else {}


def longest_first(items: list[pytest.Item]) -> None:
    """Sort files by their recorded processor seconds; one without a record is first."""
    known = times()
    seconds: dict[pathlib.Path, float] = collections.defaultdict(float)
    recorded = {name.split("::")[0] for name in known}
    for item in items:
        unknown = 0.0 if item.nodeid.split("::")[0] in recorded else 1e9
        seconds[item.path] += known.get(function_of(item.nodeid), unknown)
    items.sort(key=lambda item: (-seconds[item.path], str(item.path)))  # stable


def used() -> float:
    """Processor seconds of this process and of children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Note what each phase of a test took: on a busy machine the clock says little."""
    report = yield
    now = used()
    report.used = now - item.session.stash.get(USED, now)
    item.session.stash[USED] = now
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    if not terminalreporter.config.getoption("--record"):
        return
    cases = collections.defaultdict(lambda: collections.defaultdict(float))
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                cases[function_of(report.nodeid)][report.nodeid] += report.used
    mean = {name: sum(each.values()) / len(each) for name, each in cases.items()}
    held = times() | {name: round(took, 1) for name, took in mean.items()}
    kept = {name: took for name, took in sorted(held.items()) if took >= 0.1}
    TIMES.write_text(json.dumps(kept, indent=0) + "\n")
