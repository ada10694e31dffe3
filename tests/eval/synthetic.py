"""Run directories without a run: rows as the harness writes them, made up."""

import json
import pathlib
import random

import pyarrow
import pyarrow.parquet

from kvjax.eval.rows import ROWS

VERSIONS = {"kvjax": "0.1.0", "jax": "0.11.2", "flax": "0.12.12"}
STRENGTH = {"random": 0.1, "streaming_llm": 0.3, "knorm": 0.45, "h2o": 0.7}
TEXT = "The river runs. [KQ=ab3d]\n[MX=77qz] Old trees stand.\n" * 6 + "? [MX="


def row(task: str, length: int, name: str, keep: float | None, **fields) -> dict:
    """One row of the contract between harness and report."""
    full = length * 4 * 4 * 32 * 2 * 4
    share = keep or (0.3 if "kivi" in name else 1.0)
    score = min(1.0, 0.97 * share ** (1.2 - STRENGTH.get(name, 0.95)))
    return {
        "cell": f"{task}-{length}-{name}-{keep}-{fields.get('depth')}",
        "model": "kvjax-tiny",
        "task": task,
        "length": length,
        "depth": None,
        "compression": name,
        "overrides": "{}",
        "keep": keep,
        "visibility": "query_agnostic",
        "items": 32,
        "score": score,
        "score_se": (score * (1 - score) / 32) ** 0.5,
        "agreement": score,
        "agreement_se": (score * (1 - score) / 32) ** 0.5,
        "resident_bytes": full * share + 2048.0,
        "full_bytes": float(full),
        "host_bytes": 0.0,
        "prefill_ms": 40.0,
        "compress_ms": 4.0,
        "ms_per_token": 2.0 + 3 * share + (0.8 if "kivi" in name else 0),
        "compile_s": 3.0,
        "seed": 0,
        "batch": 8,
        "nll": None,
        "kl": None,
        "schema": 3,
        "versions": json.dumps(VERSIONS),
        "device": "cpu",
        "date": "2026-11-21T01:00:00",
        **fields,
    }


def kept(length: int, keep: float, seed: int) -> list:
    """`[layer][kv_head][positions]` of a prompt, drawn."""
    draw = random.Random(seed)
    count = int(length * keep)
    return [
        [sorted(draw.sample(range(length), count)) for _ in range(4)] for _ in range(4)
    ]


def make_rows(names, keeps=(0.5, 0.25, 0.1), needle: bool = True) -> list[dict]:
    """All rows of a small sweep."""
    rows = []
    for name in names:
        budgets = [None] if name in ("none", "kivi_4bit") else list(keeps)
        for keep in budgets:
            for task in ("recall", "chain"):
                rows += [row(task, n, name, keep) for n in (512, 1024)]
            lost = {"score": None, "kl": 0.02 / (keep or 1.0) - 0.02, "nll": 1.0}
            rows.append(row("text", 512, name, keep, **lost))
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0) if needle else ():
                rows += [row("niah", n, name, keep, depth=depth) for n in (512, 1024)]
    return rows


def full_map(name: str, words: list[str], seed: int = 0, keep: float = 0.25) -> dict:
    """A map of words with all that a map can hold: 4 layers of 4 heads."""
    draw, count = random.Random(seed), len(words)
    later = [" and", " so", " on", "."]

    def heads(value, size: int) -> list:
        return [[[value() for _ in range(size)] for _ in range(4)] for _ in range(4)]

    numbers = {
        column: [round(draw.expovariate(5), 4) for _ in later[1:]]
        for column in ("nll", "nll_full", "kl")
    }
    return {
        "text": "".join(words),
        "question": "",
        "compression": name,
        "keep": keep,
        "task": "recall",
        "tokens": words,
        "kept": kept(count, keep, seed),
        "following": {"tokens": later, **numbers, "agrees": [1.0, 0.0, 1.0]},
        "departures": {
            "tokens": later,
            "times": [0, 2, 3, 4],
            "left": heads(lambda: draw.choice([None, 0, 2, 3]), count + len(later)),
        },
        "worth": heads(lambda: round(draw.gauss(0, 0.01), 4), count),
    }


def make_run(path: pathlib.Path, names, **kwargs) -> pathlib.Path:
    """A run directory with those methods."""
    for folder in ("rows", "maps"):
        (path / folder).mkdir(parents=True)
    about = {
        "schema": 3,
        **VERSIONS,
        "device": "cpu",
        "date": "2026-11-21T01:00:00",
        "model": "kvjax-tiny",
        "model_fingerprint": "abc123",
        "config": {"tasks": ["recall", "chain"], "seed": 0},
    }
    (path / "run.json").write_text(json.dumps(about))
    for number, cell in enumerate(make_rows(names, **kwargs)):
        table = pyarrow.Table.from_pylist([cell], schema=ROWS)
        pyarrow.parquet.write_table(table, path / "rows" / f"{number:04d}.parquet")
    for number, name in enumerate(n for n in names if n not in ("none", "kivi_4bit")):
        entry = {
            "text": TEXT,
            "question": "? [MX=",
            "compression": name,
            "keep": 0.25,
            "task": "recall",
            "kept": kept(len(TEXT) + 1, 0.25, number),
        }
        (path / "maps" / f"{number}.json").write_text(json.dumps(entry))
    return path
