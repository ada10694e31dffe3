"""Makes `.venv`: a Python >= 3.12, the locked dependencies, kvjax in editable form.

Run by whatever `python3` there is (3.8 or later, standard library only), with no
activated environment and no input. A second run does nothing while requirements.lock,
pyproject.toml and this file are unchanged.

uv installs about five times faster than pip, so pip first installs uv alone, at the
version and hashes of the lock, and uv installs the rest. If uv fails for whatever
reason (no wheel, an index that only pip is configured for), pip does it all.
"""

import glob
import hashlib
import os
import pathlib
import pwd
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"
STAMP = VENV / ".kvjax-setup"
MINORS = ("3.12", "3.13", "3.14")  # what the lock has wheels for; 3.12 is tested most
PREFIXES = (
    "/usr/local/bin",
    "/usr/bin",
    "/opt/homebrew/bin",
    "/opt/local/bin",
    "/usr/local/opt/python@*/bin",
    "/opt/homebrew/opt/python@*/bin",
    "/opt/python/*/bin",
    "/Library/Frameworks/Python.framework/Versions/*/bin",
)


def fingerprint():
    """Changes when the environment has to be made again."""
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "pyproject.toml", pathlib.Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def version(executable):
    """`(major, minor)` of a CPython that can make a venv, or None."""
    code = (
        "import ensurepip, sys, venv; assert sys.implementation.name == 'cpython';"
        "assert not hasattr(sys, '_is_gil_enabled') or sys._is_gil_enabled();"
        "print(*sys.version_info[:2])"
    )
    try:
        out = subprocess.run(
            [executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        ).stdout.split()
        return int(out[0]), int(out[1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def usable(found):
    """Whether the lock serves this `(major, minor)`; None is what was not found."""
    return found is not None and "%d.%d" % found in MINORS


def uv_find(minor):
    """Paths that `uv python find` answers with, if there is a uv."""
    uv = shutil.which("uv")
    if uv is None:
        return []
    found = subprocess.run(
        [uv, "python", "find", "--no-project", "--no-python-downloads", minor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return found.stdout.decode().split("\n")[:1] if found.returncode == 0 else []


def pyenv_roots():
    """Where pyenv may live, even when its variables and shims are not set up."""
    home = pathlib.Path.home()
    yield os.environ.get("PYENV_ROOT")
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if os.path.basename(folder) == "shims":
            yield os.path.dirname(folder)
    running = pathlib.Path(os.path.realpath(sys.executable)).parents
    if len(running) > 3 and running[2].name == "versions":
        yield str(running[3])
    yield str(home / ".pyenv")
    yield os.path.join(pwd.getpwuid(os.getuid()).pw_dir, ".pyenv")
    yield "/opt/pyenv"
    yield "/usr/local/pyenv"


def candidates():
    """Yields `(where, executable)`, the likeliest and cheapest first."""
    home = pathlib.Path.home()
    data = pathlib.Path(os.environ.get("XDG_DATA_HOME", home / ".local" / "share"))
    uv_data = os.environ.get("UV_PYTHON_INSTALL_DIR", data / "uv" / "python")
    pyenv = list(dict.fromkeys(root for root in pyenv_roots() if root))
    if os.environ.get("KVJAX_PYTHON"):
        yield "KVJAX_PYTHON", os.environ["KVJAX_PYTHON"]
    yield "this interpreter", sys.executable
    for minor in MINORS:
        name = "python" + minor
        yield "PATH", shutil.which(name) or name
        for root in pyenv:
            pattern = os.path.join(root, "versions", minor + ".*", "bin", name)
            for path in sorted(glob.glob(pattern)) or [pattern]:
                yield "pyenv", path
        for path in uv_find(minor):
            yield "uv python find", path
        pattern = os.path.join(str(uv_data), "cpython-" + minor + "*", "bin", name)
        for path in sorted(glob.glob(pattern)) or [pattern]:
            yield "uv", path
        for prefix in PREFIXES:
            for path in sorted(glob.glob(os.path.join(prefix, name))):
                yield "usual prefix", path
    yield "PATH", shutil.which("python3") or "python3"


def find_python():
    """The executable to make the venv with; exits with what was tried if none."""
    tried = {}
    for where, executable in candidates():
        if executable in tried:
            continue
        got = version(executable)
        if usable(got):
            return executable
        found = "not found or not usable" if got is None else "Python %d.%d" % got
        tried[executable] = "  %-16s %s: %s" % (where, executable, found)
    sys.exit(
        "error: kvjax needs CPython 3.12, 3.13 or 3.14, and none was found. "
        "Looked at:\n%s\nalso in: %s\nInstall one (`uv python install 3.12`, "
        "`pyenv install 3.12`, your system's packages), or name one with "
        "`KVJAX_PYTHON=/path/to/python3.12 make setup`."
        % ("\n".join(tried.values()), ", ".join(PREFIXES))
    )


def run(*command, **kwargs):
    """Runs a command without input; True when it succeeded."""
    kwargs.setdefault("env", environment())
    done = subprocess.run(
        [str(part) for part in command], stdin=subprocess.DEVNULL, cwd=ROOT, **kwargs
    )
    return done.returncode == 0


def environment():
    """The caller's environment, less what points installers at another place."""
    drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    # pip trusts the system's certificates; uv only when told so.
    env.setdefault("UV_SYSTEM_CERTS", "1")
    env.setdefault("UV_NO_PROGRESS", "1")
    return env


def locked_uv():
    """The lock's lines for uv alone: its pin and its hashes."""
    text = LOCK.read_text(encoding="utf-8")
    match = re.search(r"^uv==.*\n(?:[ ]+--hash=.*\n)+", text, re.MULTILINE)
    if match is None:
        sys.exit("error: requirements.lock does not pin uv; run `make lock`.")
    return match.group()


def install_with_uv():
    """Installs uv, then everything else with it; False if that did not work."""
    only_uv = VENV / "uv.txt"
    only_uv.write_text(locked_uv(), encoding="utf-8")
    pip = [PYTHON, "-m", "pip", "install", "-q", "--require-hashes", "-r", only_uv]
    uv = [VENV / "bin" / "uv", "pip", "install", "-q", "--python", PYTHON]
    return (
        run(*pip)
        and run(*uv, "--require-hashes", "-r", LOCK)
        and run(*uv, "--no-deps", "--no-build-isolation", "-e", ROOT)
    )


def install_with_pip():
    """The slow way, for where uv cannot reach what pip can."""
    pip = [PYTHON, "-m", "pip", "install", "-q"]
    return run(*pip, "--require-hashes", "-r", LOCK) and run(
        *pip, "--no-deps", "--no-build-isolation", "-e", ROOT
    )


def main():
    """Makes the environment, unless it is there already."""
    want = fingerprint()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == want:
        return
    start = time.time()
    if not usable(version(str(PYTHON))):
        executable = find_python()
        print("setup: .venv with %s" % executable, flush=True)
        if not run(executable, "-m", "venv", "--clear", VENV):
            sys.exit("error: %s could not make .venv." % executable)
    print("setup: installing requirements.lock", flush=True)
    if not install_with_uv():
        print("setup: uv did not manage; installing with pip", flush=True)
        if not install_with_pip():
            sys.exit("error: the dependencies could not be installed; see above.")
    STAMP.write_text(want)
    print("setup: done in %.0f s" % (time.time() - start), flush=True)


if __name__ == "__main__":
    main()
