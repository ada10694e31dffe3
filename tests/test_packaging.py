"""What a user gets from the wheel and from the sdist."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from tests.tree import ROOT

LINKED = ("models", "train", "eval", "configs", "pallas_kernels")
pytestmark = pytest.mark.slow


def run(*command: object, **kwargs) -> str:
    """Standard output of a command that has to succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> pathlib.Path:
    """An sdist, a wheel made straight from the tree, and one made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--outdir", folder, ROOT)
    run(*build, "--wheel", "--outdir", folder / "direct", ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> pathlib.Path:
    """Interpreter of an empty venv with the wheel; dependencies through a .pth."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    wheel = next(dist.glob("*.whl"))
    install = ("-m", "pip", "install", "-q", "--no-index", "--no-deps")
    run(python, *install, wheel)
    site = pathlib.Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
        ).strip()
    )
    # addsitedir would run this environment's .pth files too, the editable kvjax's
    # among them; a plain line only appends the folder.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def ask(python: pathlib.Path, code: str) -> str:
    """What `code` prints in the installed environment, away from the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return run(python, "-c", code, cwd=python.parent, env=environment).strip()


def test_wheel_and_sdist_hold_real_files(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        members = sdist.getmembers()
    assert {name.split("/")[0] for name in names} == {"kvjax", "kvjax-0.1.0.dist-info"}
    assert all(member.isreg() for member in members), "links in the sdist"
    inside = {member.name.split("/", 1)[1] for member in members}
    assert not {name.split("/")[0] for name in inside} & set(LINKED)
    for folder in LINKED:
        files = {
            f"kvjax/{path.relative_to(ROOT)}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert files <= set(names) and files <= inside, folder


def test_wheel_from_sdist_equals_wheel_from_tree(dist):
    def contents(path):
        with zipfile.ZipFile(path) as wheel:
            return {i.filename: i.CRC for i in wheel.infolist()}

    from_sdist, direct = next(dist.glob("*.whl")), next(dist.glob("direct/*.whl"))
    assert contents(from_sdist) == contents(direct)


def test_imports_from_the_wheel(installed):
    code = "import kvjax, kvjax.models, kvjax.eval; print(kvjax.models.__file__)"
    where = ask(installed, code)
    assert where.startswith(str(installed.parent.parent)), where


def test_no_top_level_packages(installed):
    code = (
        "import importlib.util as u;"
        f"print([n for n in {LINKED} if u.find_spec(n) is not None])"
    )
    assert ask(installed, code) == "[]"


def test_reads_a_preset_as_a_resource(installed):
    code = (
        "from importlib import resources;"
        "configs = resources.files('kvjax') / 'configs';"
        "texts = [f.read_text() for d in configs.iterdir() if d.is_dir()"
        " for f in d.iterdir() if f.name.endswith('.yaml')];"
        "print(len(texts), min(map(len, texts)))"
    )
    count, shortest = map(int, ask(installed, code).split())
    assert count > 0 and shortest > 0
