"""Command lines and YAML files that are nearly right, from a seed."""

import copy
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import yaml

from kvjax.compress import compressions
from kvjax.compress.presets import canonical, compression
from kvjax.train.recipe import as_tree
from tests.train.tiny_run import compressed

ODD = (
    *("", " ", ",", "=", "-", "--", "x", "é", "１", "\udcff", "a\0b", "a" * 3000),
    *("nan", "inf", "-inf", "1e400", "-1", "0", "1.5", "1" + "0" * 30, "9" * 5000),
    *("true", "null", "None", "0x10", "[1", "{a: 1", "[]", "{}", "a: b", "1_000"),
    *("/dev/null", "..", ".", "~nobody-here/x", "nowhere.yaml", "a/" * 200),
)
"""Values of an option that are hardly ever right."""

PATHS = (
    *("a", "a=", "=1", "=", "a..b=1", ".=1", "a=[1", "a={b", "evict=3", "evict=null"),
    *("evict.score=5", "evict.score.window=-1", "evict.score.window=1" + "0" * 30),
    *("evict.budget.keep=.nan", "evict.budget.keep=2", "store.keys.bits=true"),
    *("overrides={a: 1}", "overrides=3", "overrides.snapkv=", "overrides..x=1"),
    *("defaults=[1]", "everywhere={x: 1}", "everywhere=1", "tasks=5", "tasks=[5]"),
    *("tasks.0=recall", "tasks.9=recall", "tasks.x.y=1", "lengths=[0]", "batch=1e9"),
    *("seed=-1", "seed=1" + "0" * 30, "model=", "model={}", "stages=[]", "resume=1"),
    *("stages.0.steps=0", "stages.0.lengths={}", "optimizer=3", "data.sources=[]"),
    *("inputs=1", "inputs.x=1", "a=&x [*x]", "a=!!python/object:os.system x"),
    *("\udcff=1", "a=\udcff", "a=2020-01-01", "defaults={a.b: 2020-01-01}"),
)
"""Assignments that are hardly ever right."""

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**30, 10**400, 1e308, float("nan")),
    *(float("inf"), "", "x", "é", "1", "nan", "a" * 3000, [], {}, [[]], {"a": None}),
    *([1, "x", None], {"type": "x"}, {"type": None}, {1: 2}, {None: 1}, b"bytes"),
)
"""Values of a field that are hardly ever right."""


def lines(here: pathlib.Path) -> dict[str, list[str]]:
    """A valid command line of each command."""
    own = str(here / "own.yaml")
    return {
        "generate": [
            *("--prompt", "abc", "--max-new-tokens", "4", "--temperature", "0.5"),
            *("--top-k", "5", "--top-p", "0.9", "--seed", "1", "--keep", "0.5"),
            *("--compression", "snapkv", "--set", "evict.score.window=8", "--json"),
            *("--stop", "]", "--dtype", "float32", "--model", "kvjax-tiny"),
        ],
        "bench": [
            *("--compression", f"none,{own}", "--keep", "0.5", "--length", "64"),
            *("--batch", "1", "--new-tokens", "2", "--repeats", "1", "--json"),
            *("--set", "read=all", "--dtype", "auto", "--model", "kvjax-tiny"),
        ],
        "eval": [
            *("--config", str(here / "eval.yaml"), "--compression", f"snapkv,{own}"),
            *("--keep", "0.5,0.25", "--tasks", "recall", "--lengths", "96"),
            *("--items", "2", "--seed", "1", "--visibility", "query_agnostic"),
            *("--set", "batch=2", "--set", "overrides.snapkv.evict.score.kernel=7"),
            *("--compression.schedule", "after_prefill", "--out", "run", "--json"),
        ],
        "lm-eval": [
            *("--tasks", "kv_choice,kv_*", "--include-path", str(here / "tasks")),
            *("--compression", own, "--keep", "0.5", "--set", "read=all"),
            *("--compress-at", "marker:Question:", "--limit", "2", "--seed", "1"),
            *("--num-fewshot", "1", "--lengths", "64,128", "--batch-size", "2"),
            *("--max-length", "100", "--max-new-tokens", "8", "--rolling-from", "16"),
            *("--out", "harness", "--model", "kvjax-tiny", "--json"),
        ],
        "finetune": [
            *("--config", str(here / "recipe.yaml"), "--set", "seed=1"),
            *("--set", "optimizer.learning_rate=0.001", "--out", "trained", "--json"),
        ],
        "report": [str(here / "run"), "--out", "report", "--json"],
        "convert": ["kvjax-tiny", "copy", "--dtype", "float16", "--overwrite"],
        "demo": ["--items", "2", "--out", "demo", "--json"],
    }


def odd_line(words: Sequence[str], draw: random.Random) -> list[str]:
    """One to three mistakes in a command line."""
    out = list(words)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(out)) if out else 0
        kind = draw.randrange(9)
        if kind <= 3 and out:
            out[at] = draw.choice(PATHS if "=" in out[at] else ODD)
        elif kind == 4 and out:
            del out[at]
        elif kind == 5 and out:
            out.insert(draw.randrange(len(out)), out[at])
        elif kind == 6:
            out.insert(at, draw.choice(("--nosuch", "--", "-x", *ODD[:12])))
        elif kind == 7 and out:
            out[at] = out[at][: draw.randrange(len(out[at]) + 1)]
        else:
            out[at:at] = ["--set", draw.choice(PATHS)]
    return out


def evaluation(here: pathlib.Path) -> dict[str, Any]:
    """A small evaluation."""
    return {
        "model": "kvjax-tiny",
        "compressions": ["snapkv", str(here / "own.yaml")],
        "keeps": [0.5],
        "tasks": [{"name": "recall", "fields": {"value_length": 1}}, "chain"],
        "lengths": [96],
        "items": 2,
        "batch": 2,
        "window": 4,
        "overrides": {"snapkv": {"evict.score.kernel": 5}},
        "defaults": {"evict.score.window": 4},
    }


def trees(here: pathlib.Path, draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A command that reads a YAML file, and what a valid one holds."""
    kind = draw.choice(("compression", "eval", "finetune"))
    if kind == "eval":
        return kind, evaluation(here)
    if kind == "finetune":
        return kind, as_tree(compressed())
    name = draw.choice(compressions())
    return kind, yaml.safe_load(canonical(compression(name))) or {"visibility": "x"}


def _places(tree: Any, at: tuple = ()) -> list[tuple]:
    pairs: list = []
    if isinstance(tree, dict):
        pairs = list(tree.items())
    elif isinstance(tree, list):
        pairs = list(enumerate(tree))
    deeper = [place for key, value in pairs for place in _places(value, (*at, key))]
    return [(*at, key) for key, _ in pairs] + deeper


def odd_tree(tree: Any, draw: random.Random) -> Any:
    """One mistake in a tree: another value, a key too few, too many or misspelt."""
    tree = copy.deepcopy(tree)
    *above, key = draw.choice(_places(tree))
    node = tree
    for one in above:
        node = node[one]
    kind = draw.randrange(6)
    if kind <= 2:
        node[key] = copy.deepcopy(draw.choice(SCALARS))
    elif kind == 3:
        del node[key]
    elif kind == 4 and isinstance(node, dict):
        node[draw.choice((f"{key}x", None, 3, True, ""))] = node[key]
    else:
        node[key] = [node[key]] if draw.random() < 0.5 else {"type": node[key]}
    return tree


def odd_bytes(text: str, draw: random.Random) -> bytes:
    """A file whose text or encoding is damaged."""
    at, kind = draw.randrange(len(text) + 1), draw.randrange(10)
    rows = text.splitlines(keepends=True)
    row = draw.randrange(len(rows))
    odd = {
        0: lambda: text[:at].encode(),
        1: lambda: text.encode(draw.choice(("utf-16", "utf-32", "utf-8-sig"))),
        2: lambda: text[:at].encode() + draw.randbytes(3) + text[at:].encode(),
        3: lambda: "".join(rows[: row + 1] + rows[row:]).encode(),  # a line twice
        4: lambda: "".join(rows[:row] + rows[row + 1 :]).encode(),
        5: lambda: (
            text[:at] + draw.choice("\t:{[&*!|>%@`'\"#\0") + text[at:]
        ).encode(),
        6: lambda: b"",
        7: lambda: b"a: &a [*a]\n" + text.encode(),
        8: lambda: ("x: " + "[" * 3000 + "]" * 3000 + "\n" + text).encode(),
        9: lambda: _bomb() + text.encode(),
    }
    return odd[kind]()


def _bomb() -> bytes:
    rows = ["b0: &b0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"]
    rows += [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 12)]
    return "".join(rows).encode()
