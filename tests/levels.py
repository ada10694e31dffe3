"""Which tests a run takes, and the order in which its workers get them.

`fast` is `make test`: nothing that is marked slow or runs in an interpreter. `ci` is
what `.ci/run` takes. `all` is `make test-all`, and pytest by itself. Of a test marked
`sweep(m, n)` there are m cases in `fast` and n in `ci`, of each `kind=` if it has one,
drawn by the hash of the commit's tree: in a few commits all of them are run, but of
those with `sweep(0, 0)`, which only `all` takes.
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


def drawn(items: list[pytest.Item], seed: str, level: str) -> set[str]:
    """The cases of sweeps that a level takes."""
    kinds = collections.defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("sweep")
        if mark is not None and not beyond(item, level):
            digest = hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest()
            kind = function_of(item.nodeid), mark.kwargs.get("kind")
            kinds[(*kind, mark.args[LEVELS.index(level)])].append((digest, item.nodeid))
    return {
        nodeid
        for (_, _, count), cases in kinds.items()
        for _, nodeid in sorted(cases)[:count]
    }


def leaves_out(item: pytest.Item, level: str, chosen: set[str]) -> bool:
    """Whether the level goes without a test."""
    if item.get_closest_marker("sweep") is not None:
        return item.nodeid not in chosen
    return beyond(item, level)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    level = str(config.getoption("--level"))
    if level != "all":
        chosen = drawn(items, tree(), level)
        gone = [item for item in items if leaves_out(item, level, chosen)]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]
    longest_first(items)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort files by their recorded processor seconds; one without a record is first."""
    known = json.loads(TIMES.read_text()) if TIMES.exists() else {}
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
    held = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    held |= {name: round(took, 1) for name, took in mean.items()}
    kept = {name: took for name, took in sorted(held.items()) if took >= 0.1}
    TIMES.write_text(json.dumps(kept, indent=0) + "\n")
