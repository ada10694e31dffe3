"""kvjax as a model of lm-evaluation-harness: rules, options and other input."""

import pytest
from lm_eval.api.registry import get_model

import kvjax
from kvjax.eval.lm_eval import KvjaxLM, LastTokens, Marker
from kvjax.eval.lm_eval import reader as reading
from kvjax.eval.lm_eval.replying import settings
from kvjax.eval.lm_eval.rule import rule_of
from kvjax.eval.lm_eval.running import load_tasks
from kvjax.eval.lm_eval.splitting import pieces
from tests.eval import tiny
from tests.eval.harnessed import SNAPKV, TEXTS, harnessed, requests, small


@pytest.mark.parametrize(
    ("rule", "text", "said"),
    [
        ("marker:Z:", "no such text", "has no 'Z:'"),
        ("marker:Q:", "Q: a", "begins with"),
        ("marker:Q:", "a" * 20 + "Q:" + "b" * 90, "is cut to its last"),
    ],
)
def test_contexts_without_the_marker_are_named(rule, text, said):
    lm = harnessed(SNAPKV, compress_at=rule, max_length=60)
    with pytest.raises(ValueError, match="request 1 .*" + said):
        asked = [("abQ: Z: c", "d"), (text, " x")]
        lm.loglikelihood(requests("loglikelihood", *asked))


@pytest.mark.parametrize(
    "rule", ["", "last", "last:0", "last:x", "last:-1", "marker:", "marker: ", "lst:1"]
)
def test_rules_that_are_none(rule):
    with pytest.raises(ValueError, match=r"last:1|marker:Question|tokens"):
        rule_of(rule)


def test_rules_are_written_as_they_are_read():
    assert rule_of("last:12") == LastTokens(tokens=12) == rule_of(LastTokens(tokens=12))
    assert rule_of("marker: a:b") == Marker(text=" a:b")
    assert str(rule_of("marker: a:b")) == "marker: a:b"
    with pytest.raises(ValueError, match="compress_at"):
        rule_of(3)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("loglikelihood", TEXTS[:4]),
        ("generate_until", [("abcdef", {"max_gen_toks": 4})]),
        ("loglikelihood_rolling", [("abc " * 20,)]),
    ],
)
def test_small_budgets_are_named_before_anything_is_read(monkeypatch, name, asked):
    c = kvjax.compression("snapkv", **{"evict.budget.keep": 0.1})
    lm = harnessed(c)
    monkeypatch.setattr(reading, "prefill", None)
    with pytest.raises(ValueError, match="protects .* contexts of the harness"):
        getattr(lm, name)(requests(name, *asked))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch": 0}, "batch"),
        ({"max_length": 257}, "max_length"),
        ({"max_length": 1}, "max_length"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"rolling_from": 0}, "rolling_from"),
        ({"seed": -1}, "seed"),
        ({"keep": 0.5}, "no token budget"),
        ({"compression": "snapkvv"}, "Did you mean 'snapkv'"),
        ({"compression": "dms"}, "evictor"),
        ({"compression": 3}, "preset"),
        ({"compress_at": None}, "compress_at"),
        ({"tokenizer": None}, "tokenizer"),
        ({"model": None}, "Decoder"),
    ],
)
def test_options_that_cannot_be_meant(fields, said):
    model, tokenizer = small()
    with pytest.raises(ValueError, match=said):
        KvjaxLM(**{"model": model, "tokenizer": tokenizer, **fields})


def test_empty_continuations_are_named():
    with pytest.raises(ValueError, match="request 1 .*empty continuation"):
        harnessed().loglikelihood(requests("loglikelihood", ("a", "b"), ("a", "")))
    with pytest.raises(ValueError, match="continuation of request 0 has 30 tokens"):
        lm = harnessed(max_length=20)
        lm.loglikelihood(requests("loglikelihood", ("a", " " + "b" * 29)))


def test_pieces_score_each_token_once():
    for context, count, first in [(1, 100, 16), (1, 5, 16), (30, 9, 16), (3, 70, 1)]:
        whole = tuple(range(context + count))
        found = list(pieces(whole[:context], whole[context:], first))
        assert sum((later for _, later in found), ()) == whole[context:]
        assert all(whole[: len(front)] == front for front, _ in found)
        assert all(len(ids) <= len(front) for front, ids in found[1:])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": True}, "temperature"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 2}, "top_p"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"max_gen_toks": "x"}, "generation_kwargs"),
        ({"until": [3]}, "until"),
        ({"until": {"a": 1}}, "until"),
        ({"nosuch": 1}, "nosuch"),
    ],
)
def test_generation_settings_that_are_not_done(asked, said):
    with pytest.raises(ValueError, match=said):
        settings(asked, 8, "</s>")


def test_generation_settings_that_are():
    found = settings({"until": "a", "num_beams": 1, "temperature": 0.0}, 8, "</s>")
    assert found.until == ("a", "</s>") and found.most == 8 and found.sampling.greedy
    how = {"do_sample": True, "temperature": 0.5, "top_k": 0, "max_new_tokens": 3}
    found = settings(how, 8, None)
    assert found.most == 3 and found.sampling.temperature == 0.5


def test_chats():
    model, tokenizer = tiny.model(eos_tokens=(2,)), tiny.tokenizer()
    lm = KvjaxLM(model, tokenizer)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so "}]
    with pytest.raises(ValueError, match="Leave apply_chat_template"):
        lm.apply_chat_template(chat)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert lm.apply_chat_template(chat[:1]) == "[user]hi[end][assistant]"
    assert lm.apply_chat_template(chat, False) == "[user]hi[end][assistant]so "
    assert lm.tokenizer_name


def test_the_harness_knows_the_model_by_name(tmp_path):
    assert get_model("kvjax") is KvjaxLM
    model, tokenizer = small()
    kvjax.save(model, tmp_path / "m", tokenizer)
    said = f"pretrained={tmp_path / 'm'},compression=snapkv,keep=0.5,dtype=float32,"
    said += "compress_at=marker:Question:,compression.evict.score.window=16"
    lm = KvjaxLM.create_from_arg_string(said, {"batch_size": 2, "device": None})
    info = lm.get_model_info()
    assert info["compress_at"] == "marker:Question:" and info["batch"] == 2
    assert info["keep"] == 0.5 and "window: 16" in info["compression"]
    for wrong, name in [
        ("compression=snapkv", "pretrained"),
        (f"{said},kep=1", "Did you mean 'keep'"),
        (f"{said},batch=3,batch_size=4", "given twice"),
        (f"{said},device=cuda:0", "JAX_PLATFORMS"),
        (f"{said},batch_size=auto", "batch"),
    ]:
        with pytest.raises(ValueError, match=name):
            KvjaxLM.create_from_arg_string(wrong)


def test_folders_of_tasks_that_cannot_be_listed(tmp_path):
    for name, task in (("a", "a"), ("b", "3")):
        (tmp_path / f"{name}.yaml").write_text(f"task: {task}\ndataset_path: json\n")
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*Correct its YAML files"):
        load_tasks(["c"], tmp_path, {})
    with pytest.raises(ValueError, match="there is no directory at"):
        load_tasks(["c"], tmp_path / ("x" * 300), {})
