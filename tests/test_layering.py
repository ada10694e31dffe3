"""Who may import whom, and what importing may do."""

import ast
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.tree import ROOT, tracked

LADDER = (
    (
        "messages",
        "files",
        "fields",
        "types",
        "rope",
        "depth",
        "turns",
        "exact",
        "config",
        "memory",
        "interrupt",
        "plaintext",
        "places",
        "inputs",
        "narrow",
        "axes",
    ),
    ("pallas_kernels",),
    ("codecs", "cache", "attention"),
    ("scorers", "budgets", "units", "merges", "prefills", "reads", "schedules"),
    ("compress",),
    ("summary",),
    ("models",),
    ("train", "eval"),
    ("planning",),
    ("cli",),
)
"""A module imports from its own rung and from those above it in this list."""

TRAIN = ("recipe", "data", "objectives", "held_out", "run")
"""The rooms of kvjax.train, in the same sense."""

RANK = {name: rank for rank, rung in enumerate(LADDER) for name in rung}
LINKED = ("models", "train", "eval", "configs", "pallas_kernels")


def imports(source: str, package: str = "") -> Iterator[str]:
    """Absolute names of the modules that `source`, in `package`, imports from.

    Relative imports are resolved against `package`, and left out without one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*parents, base]))
            if base == "kvjax":  # `from kvjax import x` is an import of kvjax.x
                yield from (f"kvjax.{alias.name}" for alias in node.names)
            else:
                yield base


SHOWING = "kvjax.summary"
"""Describes values of lower rungs, which import it inside of the methods by which they
show themselves. At the top of a module that would be a circle, which Python refuses."""


def upward(source: str, package: str) -> list[str]:
    """The imports of a kvjax module that go up the ladder."""
    here = RANK[package.split(".")[1]]
    found = [name for name in imports(source, package) if name.startswith("kvjax")]
    found = [name for name in found if name != SHOWING]
    return [name for name in found if RANK.get((name + ".").split(".")[1], 99) > here]


def packages() -> Iterator[tuple[pathlib.Path, str]]:
    """Tracked modules below kvjax, each with the package it belongs to."""
    for path in tracked(".py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in LINKED:
            parts = ("kvjax", *parts)
        if parts[0] == "kvjax" and len(parts) == 2:
            yield path, f"kvjax.{path.stem}"
        elif parts[0] == "kvjax":
            yield path, ".".join(parts[:-1])


def test_imports_go_down_the_ladder():
    bad = []
    for path, package in packages():
        name = package.split(".")[1]
        if name in ("__init__", "__main__"):
            continue
        where = path.relative_to(ROOT)
        if name not in RANK:
            bad.append(f"{where}: kvjax.{name} has no rung: give it one in {__file__}")
        else:
            source = path.read_text(encoding="utf-8")
            bad += [f"{where} imports {name}" for name in upward(source, package)]
    assert not bad, "\n".join(bad)


def test_imports_inside_train_go_down():
    bad = []
    for path, package in packages():
        _, rung, *room = package.split(".")
        if rung != "train" or not room:
            continue
        known = TRAIN[: TRAIN.index(room[0]) + 1]
        for name in imports(path.read_text(encoding="utf-8"), package):
            top, *rest = [*name.split("."), ""]
            if (top, rest[0]) == ("kvjax", "train") and rest[1] not in known:
                bad.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("from kvjax.models.decoder import Decoder", "kvjax.codecs", 1),
        ("from kvjax import models", "kvjax.codecs", 1),
        ("import kvjax.cli", "kvjax.eval.tasks", 1),
        ("import kvjax", "kvjax.train", 1),
        ("from ...models import decoder", "kvjax.cache.parts", 1),
        ("from ..parts import Slots\nfrom . import x", "kvjax.cache.parts", 0),
        ("from kvjax.types import nearest", "kvjax.rope", 0),
        ("import jax, models_of_life", "kvjax.types", 0),
    ],
)
def test_the_ladder_check_sees_every_form_of_import(source, package, found):
    assert len(upward(source, package)) == found


def test_no_bare_imports_of_linked_folders():
    bad = [
        f"{path.relative_to(ROOT)}: import {name} as kvjax.{name}"
        for path in tracked(".py")
        for name in imports(path.read_text(encoding="utf-8"))
        if name.split(".")[0] in LINKED
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name):
    link = ROOT / "kvjax" / name
    if not link.is_symlink():
        pytest.skip("not a checkout: the folders are real in an unpacked sdist")
    assert os.readlink(link) == f"../{name}"


QUIET_IMPORT = """
import importlib, pkgutil, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("importing kvjax opened a connection")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import kvjax

for module in pkgutil.walk_packages(kvjax.__path__, "kvjax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_importing_is_quiet():
    # No such platform: any device query or array at import time raises.
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET_IMPORT],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
