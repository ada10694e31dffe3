"""Which Python measures on a device, and whether it has what that imports.

Standard library only: it runs before anything is known about the machine.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv" / "bin" / "python"
WHEELS = ROOT / ".wheels"
SITE = ROOT / ".cache" / "device-site"
OLDEST = (3, 12)

NEEDED = {
    # module: its distribution; what is imported on the way to a measurement
    "jax": "jax",
    "numpy": "numpy",
    "flax.nnx": "flax",
    "optax": "optax",
    "orbax.checkpoint": "orbax-checkpoint",
    "jaxtyping": "jaxtyping",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "rich": "rich",
    "jinja2": "jinja2",
}

PROBE = """
import importlib, importlib.metadata as metadata, json, sys
needed = json.loads(sys.argv[1])
found = {"python": sys.version_info[:2], "missing": [], "versions": {}}
for module, name in needed.items():
    try:
        found["versions"][name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    try:
        importlib.import_module(module)
    except Exception as wrong:
        found["missing"].append([name, f"{type(wrong).__name__}: {wrong}"])
found["platform"] = found["kind"] = None
try:
    import jax
    device = jax.devices()[0]
    found["platform"], found["kind"] = device.platform, device.device_kind
except Exception as wrong:
    found["kind"] = f"{type(wrong).__name__}: {wrong}"
print(json.dumps(found))
"""


def path(site: pathlib.Path | None) -> str:
    """`PYTHONPATH`: what was carried, this checkout, what was there."""
    parts = [str(site) if site else "", str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(part for part in parts if part)


def look(python: str, dry: bool, site: pathlib.Path | None = None) -> dict[str, Any]:
    """What an interpreter has, or `{"broken": why}`."""
    environment = {**os.environ, "PYTHONPATH": path(site)}
    if dry:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [python, "-c", PROBE, json.dumps(NEEDED)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment
        )
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as wrong:
        return {"broken": f"{type(wrong).__name__}: {wrong}"}


def bounds() -> dict[str, str]:
    """The oldest version of each dependency, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return dict(re.findall(r'^ +"([a-z0-9-]+)>=([0-9.]+)', text, re.MULTILINE))


def lacking(found: dict[str, Any], least: dict[str, str]) -> dict[str, str]:
    """What is missing or too old, each with the reason."""
    out = {name: f"cannot be imported ({why})" for name, why in found["missing"]}
    for name, version in found["versions"].items():
        want = least.get(name)
        if want and name not in out and _numbers(version) < _numbers(want):
            out[name] = f"is {version}, and {want} is the oldest that is tested"
    for name in NEEDED.values():
        if name in out and name not in found["versions"]:
            out[name] = "is not installed"
    return out


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def usable(found: dict[str, Any], dry: bool) -> str:
    """Why an interpreter is out of the question; empty if it is not."""
    if "broken" in found:
        return f"does not run ({found['broken']})"
    if tuple(found["python"]) < OLDEST:
        return "is Python {}.{}, and 3.12 is needed".format(*found["python"])
    if found["platform"] is None:
        return f"has no JAX that runs ({found['kind']})"
    if not dry and found["platform"] != "gpu":
        return f"has a JAX that sees no GPU, but {found['kind']}"
    return ""


def chosen(
    given: str | None, dry: bool
) -> tuple[str, pathlib.Path | None, dict[str, Any]]:
    """The interpreter, the folder of carried packages if it needs one, what it has.

    Raises:
        ValueError: there is none, or packages are missing; says which, and the remedy.
    """
    names = [given] if given else list(dict.fromkeys([sys.executable, str(VENV)]))
    refused, least = [], bounds()
    candidates = []
    for python in names:
        found = look(python, dry)
        why = usable(found, dry)
        if why:
            refused.append(f"{python} {why}")
        else:
            candidates.append((len(lacking(found, least)), python, found))
    if not candidates:
        remedy = "`make setup`" if dry else "`pip install '.[cuda13]'`, or DRY=1"
        raise ValueError(
            f"no Python for this: {'; '.join(refused)}. Name one with PYTHON=..., "
            f"or see to it that there is one: {remedy}."
        )
    _, python, found = min(candidates, key=lambda one: one[0])
    lacks = lacking(found, least)
    if not lacks:
        return python, None, found
    if any(WHEELS.glob("*.whl")):
        installed(python)
        found = look(python, dry, SITE)
        lacks = lacking(found, least)
        if not lacks:
            return python, SITE, found
    raise ValueError(missing(python, lacks))


def missing(python: str, lacks: dict[str, str]) -> str:
    """What is missing, by name, and what to do."""
    lines = [f"  {name} {why}" for name, why in sorted(lacks.items())]
    wanted = " ".join(f"'{name}>={bounds().get(name, '0')}'" for name in sorted(lacks))
    return "\n".join(
        [
            f"{python} lacks what the measurements import:",
            *lines,
            "With a network: " + f"{python} -m pip install {wanted}",
            f"Without one: `make device-pack` where there is one, and carry "
            f"{WHEELS.name}/ along.",
        ]
    )


def installed(python: str) -> None:
    """Put the carried wheels into a folder of their own.

    Raises:
        ValueError: pip could not.
    """
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    pip = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(SITE)]
    done = subprocess.run([*pip, *wheels], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise ValueError(f"{python} could not install {WHEELS.name}/: {last}")
