"""Small files in the layouts of published data."""

import json
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def write(path: pathlib.Path, rows: Rows) -> str:
    """A JSONL file; its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ruler(count: int = 12) -> Rows:
    """Rows of kvpress' layout: two questions of each context."""
    rng = random.Random(0)
    return [
        {
            "context": f"Text {i // 2}: " + "the grass is green. " * (20 + i // 2),
            "question": f"What is the number of part {i}?\n",
            "answer": [str(rng.randrange(10**6)), f"word{i}"],
            "answer_prefix": "Answer:",
            "max_new_tokens": 24,
            "task": "niah_multivalue" if i < count - 2 else "qa_1",
        }
        for i in range(count)
    ]


def gsm8k(count: int = 12, begin: int = 0) -> Rows:
    """Rows of GSM8K."""
    return [
        {
            "question": f"Ann has {i} nuts and buys {1000 + 3 * i}. How many has she?",
            "answer": f"She has {i}+{1000 + 3 * i} = <<{i}+1={i}>>nuts.\n"
            f"#### {1000 + 4 * i:,}",
        }
        for i in range(begin, begin + count)
    ]


def mmlu(count: int = 12, begin: int = 0) -> Rows:
    """Rows of MMLU, of two subjects."""
    return [
        {
            "subject": ("college_logic", "birds")[i % 2],
            "question": f"Which is number {i}?",
            "choices": [f"bird {i + k}" for k in range(4)],
            "answer": "ABCD"[i % 4],
        }
        for i in range(begin, begin + count)
    ]


def csqa(count: int = 12) -> Rows:
    """Rows of CommonsenseQA as it was released."""
    return [
        {
            "answerKey": "ABCDE"[i % 5],
            "question": {
                "stem": f"Where is bird {i}?",
                "choices": [
                    {"label": label, "text": f"place {label}{i}"} for label in "ABCDE"
                ],
            },
        }
        for i in range(count)
    ]


def humaneval(count: int = 4) -> Rows:
    """Rows of HumanEval."""
    return [
        {
            "task_id": f"Test/{i}",
            "prompt": "from typing import List\n\n\n"
            f'def add{i}(x: int) -> int:\n    """Add {i} to x."""\n',
            "entry_point": f"add{i}",
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(f):\n    assert f(1) == {i + 1}\n",
        }
        for i in range(count)
    ]


def files(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The fields of every task of files, with the files that they name."""
    made = {
        "dataset": {"path": write(folder / "ruler.jsonl", ruler())},
        "gsm8k": {
            "path": write(folder / "g_test.jsonl", gsm8k()),
            "shots_path": write(folder / "g.jsonl", gsm8k(4, 100)),
            "shots": 3,
        },
        "mmlu": {
            "path": write(folder / "m_test.jsonl", mmlu()),
            "shots_path": write(folder / "m.jsonl", mmlu(8, 100)),
            "shots": 3,
        },
        "csqa": {"path": write(folder / "c_dev.jsonl", csqa()), "shots": 3},
        "humaneval": {
            "path": write(folder / "HumanEval.jsonl", humaneval()),
            "shots": 2,
            "allow_code": True,
        },
    }
    source = {"path": made["gsm8k"]["path"], "exemplars": made["gsm8k"]["shots_path"]}
    made["longgenbench"] = {**source, "shots": 2, "problems": 3}
    return made
