"""How workers get their tests: by files, and so that a worker may die.

With pytest-xdist's own scheduler a run whose worker dies may wait for ever: a worker
begins a test only once it knows the next, and the one that takes the place of the dead
may be given one test alone; the test that killed is given out again, too.
"""

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class FileScheduling(LoadFileScheduling):
    """`--dist loadfile`; a test in which a worker dies fails, and the others go on."""

    def remove_node(self, node: WorkerController) -> str | None:
        """Give out again what a dead worker had left, less the test it died in."""
        units = self.assigned_work.pop(node)
        left = [
            (unit, test)
            for unit in units.values()
            for test, done in unit.items()
            if not done
        ]
        if not left:
            return None
        unit, died = left[0]
        unit[died] = True
        self.workqueue |= {
            file: unit for file, unit in units.items() if not all(unit.values())
        }
        for other in self.assigned_work:
            self._reschedule(other)
        return died

    def _reschedule(self, node: WorkerController) -> None:
        """Never leave a worker with one test, unless it is told that it is the last."""
        if node not in self.registered_collections:
            return  # one that has just begun, and asks by itself
        super()._reschedule(node)
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> FileScheduling | None:
    return FileScheduling(config, log) if config.option.dist == "loadfile" else None
