"""`kvjax lm-eval`, on tasks of local files."""

import importlib.util
import json
import pathlib

import pytest

from kvjax.cli.lm_eval import LmEval
from tests.eval.harness_tasks import write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    broken = "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: no.json}\n"
    (folder / "broken.yaml").write_text(broken)
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def test_a_run(kvjax, checkpoint, tasks, tmp_path):
    out = tmp_path / "out"
    line = ["lm-eval", "--model", checkpoint, "--include-path", tasks, "--limit", 2]
    line += ["--tasks", "kv_choice,kv_text", "--compression", "knorm", "--keep", 0.5]
    code, said, err = kvjax(*line, "--out", out, "--batch-size", 2)
    assert code == 0, err
    for word in ("kv_choice", "acc_norm", "word_perplexity", "±", "KiB each", "last:1"):
        assert word in said
    found = json.loads((out / "results.json").read_text())
    assert found["config"]["keep"] == 0.5 and found["config"]["batch"] == 2
    assert found["config"]["resident_bytes"] < found["config"]["full_bytes"]
    assert found["results"]["kv_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    code, _, err = kvjax(*line, "--out", out)
    assert code == 2 and "never written over" in err
    code, said, err = kvjax(*line, "--batch-size", 2, "--json")
    assert code == 0, err
    (row,) = [row for row in json.loads(said)["rows"] if row["metric"] == "acc"]
    assert row["value"] == found["results"]["kv_choice"]["acc,none"]
    assert (row["items"], row["shots"], row["task"]) == (2, 1, "kv_choice")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", ","], "--tasks names none"),
        (["--tasks", "kv_chioce"], "Did you mean 'kv_choice'"),
        (["--tasks", "kv_choice", "--compress-at", "lst:1"], "last:1"),
        (["--tasks", "kv_choice", "--lengths", "x"], "--lengths"),
        (["--tasks", "kv_choice", "--lengths", "0"], "--lengths"),
        (["--tasks", "kv_choice", "--out", "/dev/null"], "--out"),
        (["--tasks", "kv_choice", "--keep", "0.5"], "no token budget"),
        (["--tasks", "broken"], "lm-eval cannot load"),
        (["--tasks", "kv_choice", "--include-path", "nowhere"], "no directory at"),
    ],
)
def test_mistakes_cost_no_model(kvjax, tasks, monkeypatch, words, said):
    monkeypatch.setattr("kvjax.cli.lm_eval.load_model", None)
    # The harness lists thousands of files beside its manager: here, those of the test.
    beside = {"manager.py": tasks / "manager.py"}
    monkeypatch.setattr(
        "lm_eval.tasks.manager.Path",
        lambda path: beside.get(pathlib.Path(path).name, pathlib.Path(path)),
    )
    where = [] if "--include-path" in words else ["--include-path", tasks]
    code, _, err = kvjax("lm-eval", *where, *words)
    assert code == 2 and said in err


def test_what_is_left_of_an_interrupted_run(kvjax, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LmEval, "run", stop)
    code, _, err = kvjax("lm-eval", "--tasks", "gsm8k")
    assert code == 130 and "Nothing is kept" in err and "goes on" not in err


def test_without_the_harness(kvjax, monkeypatch):
    find = importlib.util.find_spec

    def gone(name, *rest):
        return None if name == "lm_eval" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", gone)
    code, _, err = kvjax("lm-eval", "--tasks", "gsm8k")
    assert code == 2 and 'pip install "kvjax[lm-eval]"' in err


def test_options_reach_the_harness(monkeypatch, checkpoint, tasks):
    """Those that change nothing in a small run."""
    import lm_eval

    seen = {}

    def evaluate(**given):
        seen.update(given)
        raise ValueError("stopped here")

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    command = LmEval(
        tasks="kv_choice,kv_*",
        include_path=tasks,
        model=str(checkpoint),
        num_fewshot=3,
        apply_chat_template=True,
        system_instruction="Be short.",
        seed=7,
        max_length=100,
    )
    from kvjax.cli.main import execute

    assert execute(command) == 2
    assert seen["num_fewshot"] == 3 and seen["fewshot_random_seed"] == 7
    assert seen["apply_chat_template"] and seen["fewshot_as_multiturn"]
    assert seen["system_instruction"] == "Be short." and seen["limit"] is None
    assert seen["model"].max_length == 100 and seen["model"].seed == 7
    assert {*seen["task_manager"].loaded["tasks"]} == {
        "kv_choice",
        "kv_reply",
        "kv_text",
    }
