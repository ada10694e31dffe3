"""Tasks of lm-evaluation-harness on local files: one of each output type."""

import json
import pathlib
from typing import Any

import yaml

TASKS = ("kv_choice", "kv_reply", "kv_text")

ITEMS = (
    ("The fox met a wolf near the river.", "wolf", ["wolf", "bear", "old owl"]),
    ("Anna lost a key in the long dark hall.", "key", ["coin", "key", "map"]),
    ("Tom saw a red bird on the roof.", "bird", ["cat", "bird", "red car"]),
    ("The king gave a ring to his son.", "ring", ["ring", "horse", "sword"]),
)


def write_tasks(folder: pathlib.Path, until: tuple[str, ...] = (".", "\n")) -> None:
    """YAML files and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"text": text, "word": word, "choices": choices, "label": choices.index(word)}
        for text, word, choices in ITEMS
    ]
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
    }
    ask = "Text: {{text}} Question: what is it? Answer:"
    own = {
        "kv_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": ask,
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
            "num_fewshot": 1,
        },
        "kv_reply": {
            "output_type": "generate_until",
            "doc_to_text": ask,
            "doc_to_target": "word",
            "generation_kwargs": {"until": list(until), "max_gen_toks": 8},
            "metric_list": [_mean("exact_match")],
            "num_fewshot": 1,
        },
        "kv_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, fields in own.items():
        text = yaml.safe_dump({"task": name, **common, **fields})
        (folder / f"{name}.yaml").write_text(text)


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def real_tasks(folder: pathlib.Path, data: pathlib.Path) -> tuple[str, ...]:
    """The harness's own gsm8k, and CommonsenseQA, of files beside the checkout."""
    import lm_eval.tasks

    folder.mkdir(parents=True, exist_ok=True)
    own = pathlib.Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    (folder / "their_gsm8k").write_text(own.read_text())
    files = {n: str(data / "gsm8k" / f"{n}.jsonl.gz") for n in ("train", "test")}
    gsm8k = {
        "include": "their_gsm8k",
        "task": "real_gsm8k",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    choices = "\n".join(f"{x}. {{{{question.choices[{i}].text}}}}" for i, x in LETTERS)
    csqa = {
        "task": "real_csqa",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(data / "csqa" / "dev.jsonl.gz")}
        },
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "fewshot_split": "validation",
        "doc_to_text": f"Question: {{{{question.stem}}}}\n{choices}\nAnswer:",
        "doc_to_target": "answerKey",
        "doc_to_choice": [letter for _, letter in LETTERS],
        "num_fewshot": 5,
        "metric_list": [_mean("acc")],
    }
    for tree in (gsm8k, csqa):
        (folder / f"{tree['task']}.yaml").write_text(yaml.safe_dump(tree))
    return gsm8k["task"], csqa["task"]


LETTERS = tuple(enumerate("ABCDE"))
