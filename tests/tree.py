"""The files of the checkout, for the tests that read source as text."""

import importlib.util
import pathlib
import shutil
import subprocess
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
GENERATED = {".venv", ".cache", ".git", "__pycache__", "build", "dist"} | {
    f".venv-{what}" for what in ("torch", "tpu", "cuda", "newest")
}


def tracked(suffix: str = "") -> list[pathlib.Path]:
    """Tracked files whose name ends in `suffix`; all files where there is no git.

    Links are left out: what they point to is listed under its own name.
    """
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        names = subprocess.run(command, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in names.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not GENERATED & set(p.parts)]
    return [
        path
        for path in paths
        if path.name.endswith(suffix) and path.is_file() and not path.is_symlink()
    ]


def tool(name: str) -> types.ModuleType:
    """A script of `tools/` as a module; they are no package."""
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"kvjax_tool_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # as for a script: they import each other
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
