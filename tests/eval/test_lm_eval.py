"""kvjax as a model of lm-evaluation-harness: its interface, and what is scored."""

import json
import pathlib
import random
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager

import kvjax
from kvjax.eval.lm_eval import KvjaxLM, replying
from kvjax.eval.lm_eval import reader as reading
from kvjax.models import inference
from kvjax.models.prompts import NONE
from tests.eval.harness_tasks import TASKS, real_tasks, write_tasks
from tests.eval.harnessed import SNAPKV, TEXTS, harnessed, requests, small
from tests.torch_env import find_torch_python, run_reference


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(replying, "PIECE", 4)


def logits_of(ids: list[int], front: int, c=NONE) -> np.ndarray:
    """Of a whole text in one parallel pass, compressed behind `front` tokens."""
    width = -(-len(ids) // 64) * 64
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    lengths, points = np.array([len(ids)]), np.array([front])
    return np.asarray(kvjax.simulate(small()[0], tokens, lengths, points, c))[0]


def expected(context: list[int], ids: list[int], front: int, c=NONE):
    logits = logits_of([*context, *ids], front, c)[len(context) - 1 :][: len(ids)]
    logp = logits - np.log(np.exp(logits - logits.max()).sum(-1))[:, None]
    logp -= logits.max()
    return logp[np.arange(len(ids)), ids].sum(), (logits.argmax(-1) == ids).all()


def encoded(lm: KvjaxLM, context: str, continuation: str) -> tuple[list, list]:
    if not context:
        return [lm.prefix_token_id], lm.tok_encode(continuation, False)
    return lm._encode_pair(context, continuation)


def assert_scores(lm: KvjaxLM, c, front) -> None:
    found = lm.loglikelihood(requests("loglikelihood", *TEXTS))
    for (context, continuation), (value, greedy) in zip(TEXTS, found, strict=True):
        first, ids = encoded(lm, context, continuation)
        wanted = expected(first, ids, front(context, first), c)
        assert value == pytest.approx(wanted[0], abs=1e-4)
        assert greedy is bool(wanted[1])


def test_answers_are_like_those_of_the_harness_itself():
    asked = {
        "loglikelihood": requests("loglikelihood", *TEXTS),
        "loglikelihood_rolling": requests("loglikelihood_rolling", ("ab",), ("c",)),
        "generate_until": requests(
            "generate_until", *[(text, {"max_gen_toks": 4}) for text in ("ab", "c")]
        ),
    }
    for name, those in asked.items():
        theirs = getattr(DummyLM(), name)(those)
        ours = getattr(harnessed(), name)(those)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert type(one) is type(other)
            if isinstance(one, tuple):
                assert [type(x) for x in one] == [type(x) for x in other]
        assert getattr(harnessed(), name)([]) == []


def test_without_a_compression_scores_are_those_of_a_plain_pass():
    assert_scores(harnessed(), NONE, lambda text, ids: len(ids))


@pytest.mark.parametrize("tokens", [1, 5])
def test_all_is_scored_through_the_compressed_cache(tokens):
    lm = harnessed(SNAPKV, compress_at=f"last:{tokens}")
    assert_scores(lm, SNAPKV, lambda text, ids: max(1, len(ids) - tokens))


def test_a_marker_hides_what_is_behind_it():
    texts = [one for one in TEXTS if one[0]]
    lm = harnessed(SNAPKV, compress_at="marker:Question:")
    found = lm.loglikelihood(requests("loglikelihood", *texts))
    for (context, continuation), (value, _) in zip(texts, found, strict=True):
        first, ids = encoded(lm, context, continuation)
        front = 1 + context.rindex("Question:")  # a token for each character
        assert value == pytest.approx(expected(first, ids, front, SNAPKV)[0], abs=1e-4)


def test_the_whole_cache_kept_changes_nothing():
    plain = harnessed().loglikelihood(requests("loglikelihood", *TEXTS))
    kept = harnessed(SNAPKV, keep=1.0).loglikelihood(requests("loglikelihood", *TEXTS))
    half = harnessed(SNAPKV).loglikelihood(requests("loglikelihood", *TEXTS))
    values = np.array([[value for value, _ in one] for one in (plain, kept, half)])
    np.testing.assert_allclose(values[1], values[0], atol=1e-4)
    changed = np.abs(values[2] - values[0]) > 1e-3
    assert changed.tolist() == [True, True, True, True, False, True]


def test_a_context_is_read_once(monkeypatch):
    read, rows = reading.prefill, []

    def counted(model, tokens, lengths, *rest, **options):
        rows.append(len(lengths))
        return read(model, tokens, lengths, *rest, **options)

    lm = harnessed(SNAPKV)
    monkeypatch.setattr(lm._reader, "_bytes", lambda *_: 1)
    monkeypatch.setattr(reading, "prefill", counted)
    lm.loglikelihood(requests("loglikelihood", *TEXTS[:4], TEXTS[0]))
    assert rows == [2]
    info = lm.get_model_info()
    assert (info["requests"], info["contexts"]) == (5, 2)


def test_programs_are_few():
    lm = harnessed()
    texts = ["".join(random.Random(n).choices("abc ", k=20 + n)) for n in range(24)]
    asked = [(f"a{text}a", f" {'b' * (n % 7 + 1)}") for n, text in enumerate(texts)]
    before = programs()
    lm.loglikelihood(requests("loglikelihood", *asked))
    assert programs() - before <= 4


def programs() -> int:
    jitted: Any = (inference._prefill, inference._extend)
    return sum(one._cache_size() for one in jitted)


def test_long_contexts_lose_their_beginning(caplog):
    lm = harnessed(SNAPKV, max_length=40)
    asked = [("x" * 60 + " and the end of it", " is here"), ("y" * 60, " x")]
    found = lm.loglikelihood(requests("loglikelihood", *asked))
    for (context, continuation), (value, _) in zip(asked, found, strict=True):
        first, ids = encoded(lm, context, continuation)
        kept = first[len(ids) - 41 :]
        wanted, _ = expected(kept, ids, len(kept) - 1, SNAPKV)
        assert value == pytest.approx(wanted, abs=1e-4)
    assert lm.get_model_info()["truncated_requests"] == 2
    assert len([r for r in caplog.records if "cut at its left" in r.message]) == 1


@pytest.mark.parametrize("most", [None, 40])
def test_whole_texts(most):
    """Each token once, windows as the harness has them, and all of it compressed."""
    texts = ["A dark night, and the wind blew over the hill by the sea.", "Short."]
    asked = requests("loglikelihood_rolling", *[(text,) for text in texts])
    plain = harnessed(max_length=most)
    found = plain.loglikelihood_rolling(asked)
    for text, value in zip(texts, found, strict=True):
        ids = plain.tok_encode(text)
        if len(ids) <= plain.max_length:
            wanted = expected([plain.prefix_token_id], ids, 1)[0]
            assert value == pytest.approx(wanted, abs=2e-4)
    kept = harnessed(SNAPKV, keep=1.0, max_length=most)
    np.testing.assert_allclose(kept.loglikelihood_rolling(asked), found, atol=1e-3)
    lm = harnessed(SNAPKV, max_length=most)
    changed = lm.loglikelihood_rolling(asked)
    assert abs(changed[0] - found[0]) > 1e-2
    assert changed[1] == pytest.approx(found[1], abs=1e-4)  # too short to compress
    info = lm.get_model_info()
    assert info["rolling_tokens"] == sum(len(lm.tok_encode(text)) for text in texts)
    assert 0 < info["rolling_tokens_uncompressed"] < info["rolling_tokens"] / 2
    assert info["resident_bytes"] < info["full_bytes"]


@pytest.fixture
def made(monkeypatch) -> dict[str, list[int]]:
    """Tokens of replies by their text, special ones among them."""
    found: dict[str, list[int]] = {}
    texts = replying.Replier._text

    def text(self, ids, how):
        said = texts(self, ids, how)
        found[said] = list(ids)
        return said

    monkeypatch.setattr(replying.Replier, "_text", text)
    return found


def assert_greedy(context: list[int], ids: list[int], c) -> None:
    """Each token of a reply is the likeliest one behind those in front of it."""
    logits = logits_of([*context, *ids], len(context) - 1, c)
    assert logits[len(context) - 1 :][: len(ids)].argmax(-1).tolist() == ids


@pytest.mark.parametrize("c", [NONE, SNAPKV], ids=["plain", "compressed"])
def test_replies(c, made):
    """Decoded in pieces, in batches, and given back in their order."""
    texts = ["a fox and a wolf", "some other text that is long", "a fox and a wolf"]
    lm, many = harnessed(c), {"max_gen_toks": 12}
    asked = requests("generate_until", *[(text, many) for text in texts])
    whole = lm.generate_until(asked)
    for text, reply in zip(texts, whole, strict=True):
        assert_greedy(lm.tok_encode(text), made[reply], c)
    assert whole[0] == whole[2] != whole[1] and len(whole[1]) > 6
    assert lm.tally.contexts == 2  # greedy replies to one context are one
    stops = [reply[3:5] for reply in whole]
    asked = [(t, many | {"until": [s]}) for t, s in zip(texts, stops, strict=True)]
    found = harnessed(c).generate_until(requests("generate_until", *asked))
    assert found == [reply.split(s)[0] for reply, s in zip(whole, stops, strict=True)]


def test_a_context_that_is_too_long_for_a_reply(made):
    lm, how = harnessed(max_length=30), {"max_gen_toks": 8}
    texts = ["x" * 40 + "abc", "some other text that is long"]
    asked = requests("generate_until", *[(text, how) for text in texts])
    for text, reply in zip(texts, lm.generate_until(asked), strict=True):
        assert_greedy(lm.tok_encode(text)[-22:], made[reply], NONE)
    assert lm.get_model_info()["truncated_requests"] == 2
    with pytest.raises(ValueError, match="asks for 30 tokens"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 30})))


def test_drawn_replies_differ_and_can_be_repeated():
    how = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    asked = requests("generate_until", *[("The fox", how)] * 4)
    first, again = harnessed(seed=3), harnessed(seed=3)
    found = first.generate_until(asked)
    assert len({*found}) == 4 and again.generate_until(asked) == found
    assert not {*first.generate_until(asked)} & {*found}
    assert not {*harnessed(seed=4).generate_until(asked)} & {*found}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def evaluated(lm, folder: pathlib.Path, names=TASKS, limit=None):
    evaluate: Any = lm_eval.simple_evaluate
    return evaluate(
        model=lm,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
    )


def test_tasks_of_all_kinds(tasks):
    lm = harnessed(SNAPKV, compress_at="last:2")
    found = evaluated(lm, tasks)
    results, config = found["results"], found["config"]
    assert 0 <= results["kv_choice"]["acc,none"] <= 1
    assert results["kv_reply"]["exact_match,none"] == 0
    assert results["kv_text"]["word_perplexity,none"] > 1
    assert config["compress_at"] == "last:2" and config["keep"] == 0.4
    assert "snapkv" in config["compression"]
    assert config["resident_bytes"] < config["full_bytes"]
    # 12 choices, 4 replies, 4 texts; 4 contexts, 4 again, pieces of the texts.
    assert config["requests"] == 20 and config["contexts"] > 8
    assert config["model_fingerprint"] and config["kvjax_versions"]["jax"]


@pytest.mark.sweep(0, 1)
def test_real_data(shared_data, tmp_path):
    if not (shared_data / "eval").is_dir():
        pytest.skip(f"{shared_data} has no eval/")
    names = real_tasks(tmp_path, shared_data / "eval")
    lm = harnessed(SNAPKV, max_new_tokens=8)
    found = evaluated(lm, tmp_path, names, limit=2)
    assert {*found["results"]} == {*names}
    assert found["config"]["truncated_requests"] == 12  # of a model of 256 characters


def test_scores_are_those_of_transformers(shared_data, tmp_path):
    """The harness's own `hf` model, on the same weights."""
    python, reason = find_torch_python(("torch", "transformers", "lm_eval"))
    if python is None:
        pytest.skip(reason)
    path = shared_data / "models" / "stories260k"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    write_tasks(tmp_path / "tasks", until=("park", ". She", "\n"))
    names, out = ",".join(TASKS), tmp_path / "out.json"
    run_reference(
        "torch_lm_eval.py",
        *(out, path, tmp_path / "tasks", names),
        modules=("torch", "transformers", "lm_eval"),
    )
    theirs = json.loads(out.read_text())
    model, tokenizer = kvjax.load(path, "float32")
    found = evaluated(KvjaxLM(model, tokenizer), tmp_path / "tasks")
    for task, samples in found["samples"].items():
        ours = [[answer for (answer,) in one["resps"]] for one in samples]
        for mine, their in zip(ours, theirs["answers"][task], strict=True):
            if task == "kv_reply":
                assert mine == their
            else:
                flat = np.array([np.ravel(x)[0] for x in mine], float)
                wanted = np.array([np.ravel(x)[0] for x in their], float)
                np.testing.assert_allclose(flat, wanted, atol=1e-3)
