"""Programs of models: right ones pass, and no other does or stays."""

import os
import pathlib
import tempfile
import time

import pytest

from kvjax.eval import running_code
from kvjax.eval.running_code import run_code


def test_a_right_program_passes():
    assert run_code("import math\nassert math.isqrt(9) == 3\n").passed
    assert run_code("x = '\\u00e9\\ud55c'\nprint(x)\nassert len(x) == 2").passed


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 == 2", "assertion"),
        ("def f(:", "syntax"),
        ("import sys\nsys.exit(0)\nassert 1 == 2", "exit"),
        ("import os\nos._exit(0)", "exit"),
        ("exit(0)", "error: NameError"),
        ("raise KeyboardInterrupt", "error: KeyboardInterrupt"),
        ("class E(Exception):\n def __str__(self): 1/0\nraise E", "error: E"),
        ("def f(): f()\nf()", "error: RecursionError"),
        ("x = [0] * 10**10", "memory"),
        ("x = bytearray(2**33)", "memory"),
        ("import subprocess\nsubprocess.run(['true'])", "refused"),
        ("import os\nos.system('true')", "refused"),
        ("import os\nwhile True: os.fork()", "refused"),
        ("import _posixsubprocess as p\np.fork_exec()", "refused"),
        ("import ctypes\nctypes.CDLL(None)", "refused"),
        ("import os\nos.kill(os.getppid(), 9)", "refused"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "refused"),
        ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (2**40, 2**40))", "refused"),
        ("import sqlite3\nsqlite3.connect('/tmp/other.db')", "refused"),
        (
            "import threading\ndef f():\n while True: pass\n"
            "threading.Thread(target=f).start()",
            "",
        ),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')", ""),
        ("input()", "error: EOFError"),
        ("open('big', 'wb').write(bytes(2**21))", "error: OSError"),
        ("import faulthandler as f\nf._sigsegv()", "signal 11"),
        ("import os\nassert set(os.environ) <= {'LC_CTYPE'}", ""),
        ("open('own', 'w').write('x')\nassert open('own').read() == 'x'", ""),
        ("print('x' * 10**7)", ""),
    ],
)
def test_what_programs_end_with(program, why):
    done = run_code(program, seconds=3)
    assert done.passed == (not why)
    assert done.why.startswith(why)


def test_an_endless_loop_ends():
    began = time.monotonic()
    assert run_code("while True: pass", seconds=0.3).why == "time"
    assert run_code("import time\ntime.sleep(60)", seconds=0.3).why == "time"
    assert time.monotonic() - began < 4


def test_files_elsewhere_stay_as_they_are(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for line in (
        f"open({str(kept)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'x')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        f"import pathlib; pathlib.Path({str(kept)!r}).unlink()",
        f"import os; os.symlink({str(kept)!r}, 'way'); open('way', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        assert run_code(line).why.startswith("refused"), line
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"


BREAKS_OUT = """
import os, time
for _ in range(8):
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        while True:
            with open(PLACE, "a") as file:
                file.write("alive")
            time.sleep(0.01)
while not os.path.exists(PLACE):
    time.sleep(0.01)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("loops", [True, False])
def test_what_forks_and_hides_is_killed(monkeypatch, tmp_path, apart, loops):
    """With a guard that refuses nothing, with and without process numbers apart."""
    source = running_code.GUARD.read_text().replace("sys.addaudithook(hook)", "pass")
    source = source if apart else source.replace("    _apart(call)\n", "")
    guard = tmp_path / "guard.py"
    guard.write_text(source)
    monkeypatch.setattr(running_code, "GUARD", guard)
    place = tmp_path / "alive"
    program = f"PLACE = {str(place)!r}\n{BREAKS_OUT}{'while True: pass' * loops}"
    assert run_code(program, seconds=1).why == "time" * loops
    size = place.stat().st_size
    assert size
    time.sleep(0.1)
    assert place.stat().st_size == size


def test_nothing_is_left_behind():
    before = set(pathlib.Path(tempfile.gettempdir()).glob("kvjax-code-*"))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0
    run_code("import os\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.chmod('a', 0)")
    run_code("while True: pass", seconds=0.2)
    assert set(pathlib.Path(tempfile.gettempdir()).glob("kvjax-code-*")) <= before
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_pass_cannot_be_said_by_a_program():
    writes = "import os\nfor n in range(3, 64):\n  try: os.write(n, b'passed\\n')\n"
    done = run_code(writes + "  except OSError: pass\nos._exit(0)")
    assert not done.passed and done.why == "exit"
