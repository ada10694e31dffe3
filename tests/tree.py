"""The files of the checkout, for the tests that read source as text."""

import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
GENERATED = {".venv", ".cache", ".git", "__pycache__", "build", "dist"} | {
    f".venv-{what}" for what in ("torch", "tpu", "cuda")
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
