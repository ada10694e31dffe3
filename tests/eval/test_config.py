"""Evaluations from YAML, and everything that can be wrong with one."""

import importlib.resources

import pytest

from kvjax.eval import harness, reading
from kvjax.eval.config import TaskEntry, decode_config, load_config
from kvjax.eval.methods import has, methods
from kvjax.eval.plan import plan
from kvjax.models.config import Evictor, Projection
from tests.eval import tiny
from tests.small import gates

BUNDLED = sorted(
    entry.name.removesuffix(".yaml")
    for entry in (importlib.resources.files("kvjax") / "configs/eval").iterdir()
)


@pytest.mark.sweep(3, 6)
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_evaluations_can_run(name):
    shape = tiny.model().config
    model = tiny.model(  # with all that some compression asks for
        max_positions=2048,
        evictor=Evictor(),
        projection=Projection(),
        head_gates=gates(shape.num_layers, shape.num_kv_heads),
    )
    config = load_config(name)
    if config.model == "smollm2":  # 512 of its tokens are more of characters
        config = load_config(name, {"lengths": [2000]})
    made = plan(model.config, tiny.tokenizer(), config)
    ran = {cell.method.name for cell in made.all_cells()}
    assert {"none", "random", *made.config.compressions} == ran


def test_overrides_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("compressions: [h2o]\nkeeps: [1]\ntasks: [fact]\n")
    config = load_config(path, {"items": 7, "keeps": [0.5]})
    assert (config.items, config.keeps) == (7, (0.5,))
    assert config.tasks == (TaskEntry(name="fact"),)
    assert decode_config({"compressions": [], "keeps": [1.0], "tasks": ["fact"]})


def test_windows_are_cut_and_recorded():
    config = tiny.config(
        compressions=["snapkv", "criticalkv_snapkv", "h2o_decode", "knorm"]
    )
    changed = {method.name: dict(method.overrides) for method in methods(config)}
    assert changed["snapkv"] == {"evict.score.window": 4}
    assert changed["criticalkv_snapkv"] == {"evict.score.base.window": 4}
    assert changed["h2o_decode"] == {"evict.score.recent": 4}
    assert changed["knorm"] == changed["random"] == changed["none"] == {}
    delayed = methods(tiny.config(compressions=["dms"], window=1))[-1]
    assert delayed.overrides == {"evict.score.window": 1, "prefill.window": 1}
    long = methods(tiny.config(window=1000))
    assert not any(method.overrides for method in long)


def test_who_an_override_is_for():
    config = tiny.config(
        compressions=["snapkv", "int8"],
        defaults={"evict.score.kernel": 3},
        overrides={"snapkv": {"evict.score.window": 2}},
    )
    chosen = {method.name: method for method in methods(config)}
    assert chosen["snapkv"].overrides == {
        "evict.score.window": 2,
        "evict.score.kernel": 3,
    }
    assert chosen["int8"].overrides == {}
    assert has(chosen["snapkv"].base, "evict.score.window")
    assert not has(chosen["int8"].base, "evict.score.window")
    assert chosen["int8"].keeps((0.5, 0.1)) == (None,)
    assert chosen["snapkv"].at(0.5, "query_aware").visibility == "query_aware"


def test_a_file_is_a_compression(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("evict:\n  score: knorm\n  budget: {type: uniform, keep: 0.5}\n")
    names = [m.name for m in methods(tiny.config(compressions=[str(path)]))]
    assert names == ["none", "random", "mine"]


WRONG = {
    "unknown field": ({"itms": 3}, "Did you mean 'items'"),
    "a string for a list": ({"compressions": "snapkv"}, "must be a list"),
    "unknown compression": ({"compressions": ["snapvk"]}, "Did you mean 'snapkv'"),
    "no such file": ({"compressions": ["gone.yaml"]}, "no file at"),
    "a compression twice": ({"compressions": ["h2o", "h2o"]}, "twice"),
    "one name twice": ({"compressions": ["h2o", "x/h2o.yaml"]}, "one name"),
    "unknown task": ({"tasks": ["recal"]}, "Did you mean 'recall'"),
    "unknown task field": (
        {"tasks": [{"name": "recall", "fields": {"kees": 1}}]},
        "Did you mean 'keys'",
    ),
    "a task twice": ({"tasks": ["fact", "fact"]}, "`label`"),
    "no tasks": ({"tasks": []}, "at least one"),
    "no budgets": ({"keeps": []}, "at least one"),
    "budget above one": ({"keeps": [25]}, "fraction kept"),
    "budget of zero": ({"keeps": [0.0]}, "fraction kept"),
    "budget below the window": ({"window": None}, "window"),
    "unknown visibility": ({"visibility": ["query_awre"]}, "'query_aware'"),
    "no items": ({"items": 0}, "items"),
    "no rows": ({"batch": 0}, "batch"),
    "a float of items": ({"items": 2.5}, "items"),
    "negative seed": ({"seed": -1}, "seed"),
    "depth above one": ({"depths": [2.0]}, "depths"),
    "a length too short": ({"lengths": [8]}, "does not fit"),
    "a length of zero": ({"lengths": [0]}, "length"),
    "a length beyond the model": ({"lengths": [400]}, "model's range is 256"),
    "a needle's depth": (
        {"tasks": [{"name": "niah", "fields": {"depth": 0.5}}]},
        "`depths`",
    ),
    "overrides for nobody": ({"overrides": {"h2o": {"a": 1}}}, "not evaluated"),
    "an override of no field": (
        {"overrides": {"snapkv": {"evict.score.windw": 2}}},
        "Did you mean 'window'",
    ),
    "everywhere, but not there": (
        {"compressions": ["knorm"], "everywhere": {"evict.score.window": 2}},
        "window",
    ),
    "a budget overridden": (
        {"overrides": {"snapkv": {"evict.budget.keep": 0.1}}},
        "Set `keeps`",
    ),
    "visibility overridden": (
        {"defaults": {"visibility": "query_aware"}},
        "Set `visibility`",
    ),
    "none overridden": ({"overrides": {"none": {"store.residual": 0}}}, "not evalua"),
    "text without a file": ({"tasks": [{"name": "text", "path": "gone.txt"}]}, "gone"),
    "text without a path": ({"tasks": ["text"]}, "path"),
    "a label that is too long": (
        {"tasks": [{"name": "recall", "label": "a" * 250}]},
        "`label`",
    ),
    "a label of control characters": (
        {"tasks": [{"name": "recall", "label": "a\0b"}]},
        "control character.*`label`",
    ),
    "labels that make one name": (
        {"tasks": [{"name": "recall", "label": x} for x in ("a/b", "a_b")]},
        "of two cells.*`label`",
    ),
    "keeps that print alike": (
        {"keeps": [0.5, 0.50000001]},
        "`keeps` lists 0.5 and 0.50000001",
    ),
    "a length twice": ({"lengths": [96, 96]}, "`lengths` lists 96 and 96"),
    "a task's length twice": (
        {"tasks": [{"name": "recall", "lengths": [96, 96]}]},
        r"`tasks\.0\.lengths` lists",
    ),
    "depths that print alike": (
        {"tasks": ["niah"], "depths": [0.5, 0.50000001]},
        "`depths` lists",
    ),
    "text with a length": (
        {"tasks": [{"name": "text", "path": "x", "lengths": [8]}]},
        "`context`",
    ),
    "text in turns": (
        {"tasks": [{"name": "text", "path": "x", "turns": 2}]},
        "neither `grid` nor `turns`",
    ),
    "text on a grid": (
        {"tasks": [{"name": "text", "path": "x", "grid": True}]},
        "neither `grid` nor `turns`",
    ),
    "text with no continuation": (
        {"tasks": [{"name": "text", "path": "x", "continuation": 1}]},
        "continuation",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_evaluations_are_refused_before_anything(case, tmp_path, monkeypatch):
    fields, message = WRONG[case]

    def never(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(reading, "read_prompt", never)
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        harness.run(tiny.model(), tiny.tokenizer(), tiny.config(**fields), run)
    assert not run.exists()


def test_a_compression_file_with_a_long_name(tmp_path):
    path = tmp_path / ("c" * 230 + ".yaml")
    path.write_text("evict: {score: knorm, budget: {type: uniform, keep: 0.5}}")
    config = tiny.config(compressions=[str(path)], items=1)
    with pytest.raises(
        ValueError, match="bytes, more than 200.*rename the compression's file"
    ):
        harness.run(tiny.model(), tiny.tokenizer(), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_characters_without_a_token_are_named():
    class Lettered:
        """Knows no bracket."""

        inner = tiny.tokenizer()
        bos_token_id, unk_token_id = inner.bos_token_id, inner.unk_token_id
        convert_ids_to_tokens = inner.convert_ids_to_tokens

        def encode(self, text, **options):
            tokens = self.inner.encode(text, **options)
            bracket = self.inner.encode("[", add_special_tokens=False)[0]
            return [self.unk_token_id if t == bracket else t for t in tokens]

    with pytest.raises(ValueError, match=r"'\['.* no token"):
        plan(tiny.CONFIG, Lettered(), tiny.config())
    with pytest.raises(ValueError, match="vocabulary 60"):
        plan(tiny.model(vocab_size=60).config, tiny.tokenizer(), tiny.config())


def test_unknown_evaluations(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'demo'"):
        load_config("dmo")
    with pytest.raises(ValueError, match="no file at"):
        load_config(tmp_path / "gone.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("tasks: [")
    with pytest.raises(ValueError, match="not YAML"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="bad.yaml"):
        load_config(path)
