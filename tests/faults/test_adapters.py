"""LoRA adapters of PEFT: merged into their base, or refused for what they are."""

import json
import pathlib
import shutil
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvjax.cli.main import main
from kvjax.models import load, save
from kvjax.models.bundled import shape_of
from kvjax.train.data.words import words_of
from kvjax.train.recipe import DataConfig, Source, Stage, TrainConfig
from tests.faults.files import HEAD, SINGLE, UP, fails, rewrite
from tests.models.samples import sample

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
Q, OUT, DOWN = (
    f"model.layers.{layer}.{name}.weight"
    for layer, name in (
        (0, "self_attn.q_proj"),
        (2, "self_attn.o_proj"),
        (1, "mlp.down_proj"),
    )
)
PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "../one",
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj"],
    "use_dora": False,
    "use_rslora": False,
    "revision": None,
}


def key(target: str, side: str) -> str:
    return f"base_model.model.{target.removesuffix('weight')}lora_{side}.weight"


def adapter(
    base: pathlib.Path, ranks: dict[str, int], dtype: Any = "f4", **settings: Any
) -> pathlib.Path:
    """An adapter beside its base model, with updates of some matrices."""
    rng, tensors = np.random.default_rng(0), {}
    held = load_file(base / SINGLE)
    for target, rank in ranks.items():
        rows, columns = held[target].shape
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            noise = 0.1 * rng.standard_normal(shape)
            tensors[key(target, side)] = noise.astype(dtype)
    folder = base.parent / "adapter"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)
    kept = {k: v for k, v in (PLAIN | settings).items() if v is not ...}
    (folder / CONFIG).write_text(json.dumps(kept))
    return folder


def merged(base: pathlib.Path, folder: pathlib.Path, scales: dict[str, float]):
    """The base's tensors with what NumPy makes of the updates."""
    held, updates = dict(load_file(base / SINGLE)), load_file(folder / FILE)
    for target, scale in scales.items():
        a, b = (updates[key(target, side)].astype("f8") for side in "AB")
        held[target] = held[target] + scale * (b @ a)
    return held


def agrees(folder: pathlib.Path, wanted: dict[str, np.ndarray], tmp_path) -> None:
    """What loads from `folder` is stored as `wanted`."""
    model, _ = load(folder, "float32", tokenizer=False)
    save(model, tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("ranks", "settings", "scales"),
    [
        ({Q: 4, OUT: 4, DOWN: 4}, {}, {Q: 1.5, OUT: 1.5, DOWN: 1.5}),
        ({Q: 4}, {"use_rslora": True}, {Q: 3.0}),
        ({Q: 4, HEAD: 4}, {"fan_in_fan_out": True}, {Q: 1.5, HEAD: 1.5}),
        (
            {Q: 2, OUT: 4, DOWN: 3},
            {
                "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp\..*": 3},
                "alpha_pattern": {"layers.2.self_attn.o_proj": 1.0, "proj": 99},
            },
            {Q: 3.0, OUT: 0.25, DOWN: 2.0},
        ),
        ({Q: 8}, {"r": ..., "lora_alpha": ...}, {Q: 1.0}),
    ],
)
def test_updates_are_merged(one, tmp_path, ranks, settings, scales):
    folder = adapter(one, ranks, **settings)
    agrees(folder, merged(one, folder, scales), tmp_path)


def test_piece_by_piece_and_in_other_dtypes(one, tmp_path, monkeypatch):
    monkeypatch.setattr("kvjax.models.shards.CHUNK_BYTES", 200)
    folder = adapter(one, {UP: 4, OUT: 4}, ml_dtypes.bfloat16)
    agrees(folder, merged(one, folder, {UP: 1.5, OUT: 1.5}), tmp_path)
    half, _ = load(folder, "bfloat16", tokenizer=False)
    wanted = merged(one, folder, {UP: 1.5})[UP].astype("f4").astype(ml_dtypes.bfloat16)
    found = np.asarray(half.layers.mlp.up.kernel[1]).T
    np.testing.assert_allclose(found.astype("f4"), wanted.astype("f4"), rtol=2**-7)


def test_fused_projections(tmp_path):
    save(sample("phi3"), tmp_path / "one")
    qkv = "model.layers.1.self_attn.qkv_proj.weight"
    folder = adapter(tmp_path / "one", {qkv: 4})
    agrees(folder, merged(tmp_path / "one", folder, {qkv: 1.5}), tmp_path)


def test_where_the_base_is(one, tmp_path, monkeypatch):
    """Beside the adapter, then from the working directory, then on the hub."""
    folder = adapter(one, {Q: 4}, base_model_name_or_path=str(one))
    assert shape_of(str(folder)) == sample("llama").config
    monkeypatch.chdir(tmp_path)
    for name, at in (("one", tmp_path), ("base", folder)):
        adapter(one, {Q: 4}, base_model_name_or_path=name)
        if at == folder:
            shutil.copytree(one, folder / name)
        load(folder, tokenizer=False)
    asked = []

    def fetched(name, revision):
        asked.append((name, revision))
        return one

    monkeypatch.setattr("kvjax.models.adapters.checkpoint_directory", fetched)
    adapter(one, {Q: 4}, base_model_name_or_path="owner/name", revision="v2")
    load(folder, tokenizer=False)
    assert set(asked) == {("owner/name", "v2")}


def test_the_tokenizer_is_the_adapters_or_the_bases(one, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = adapter(one, {Q: 4})
    with pytest.raises(ValueError, match=f"{one.name} has no tokenizer"):
        load(folder)
    recipe = TrainConfig(
        init=str(folder),
        data=DataConfig(sources=(Source(task="recall"),)),
        stages=(Stage(steps=1, lengths={64: 1.0}, tokens_per_step=64),),
    )
    for number, place in enumerate((one, folder)):
        words = {"a": number, "b": 1 - number}
        backend = Tokenizer(models.WordLevel(words, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(place)
        _, found = load(folder)
        assert found.get_vocab() == words
        assert words_of(recipe).tokenizer.get_vocab() == words
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--dtype", "float32"]) == 0
    wanted = merged(one, folder, {Q: 1.5})
    np.testing.assert_allclose(load_file(out / SINGLE)[Q], wanted[Q], atol=1e-6)
    assert load(out)[1].get_vocab() == words and not (out / CONFIG).exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"peft_type": "IA3"}, "`peft_type` 'IA3'; only 'LORA'.*merge_and_unload"),
        ({"peft_type": None}, "`peft_type` None"),
        ({"use_dora": True}, "`use_dora`.*merge_and_unload"),
        ({"use_something_new": True}, "`use_something_new`"),
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` \(\['lm_head'\]\)"),
        ({"bias": "lora_only"}, "`bias` 'lora_only'"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "`layer_replication`"),
        ({"target_parameters": ["mlp.experts"]}, "`target_parameters`"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes"),
        ({"r": 0}, "`r` must be an integer >= 1; got 0"),
        ({"r": "4"}, "`r` must be an integer >= 1; got '4'"),
        ({"r": 8}, r"expected \[\(r, in\), \(out, r\)\] with r = 8"),
        (
            {"lora_alpha": float("nan")},
            "`lora_alpha` must be a finite number .*got nan",
        ),
        ({"alpha_pattern": {"q_proj": "x" * 9000}}, "`alpha_pattern.q_proj` .* 'xxx"),
        ({"alpha_pattern": {"q" * 9000: "1"}}, "`alpha_pattern.qqq"),
        ({"rank_pattern": [4]}, r"`rank_pattern` must be a mapping; got \[4\]"),
        ({"rank_pattern": {"q_proj": 2.5}}, "`rank_pattern.q_proj` must be an integer"),
        ({"rank_pattern": {".?" * 60 + "Z": 2}}, "Name the modules one by one"),
        ({"rank_pattern": {"(.*).*" * 7 + "Z": 2}}, "Name the modules one by one"),
        ({"alpha_pattern": {"(.+)+Z": 2}}, "Name the modules one by one"),
        ({"alpha_pattern": {"a{1,9}" * 3: 2}}, "Name the modules one by one"),
        ({"alpha_pattern": {"a" * 301: 2}}, "Name the modules one by one"),
        ({"alpha_pattern": {"a{99999999999999}": 2}}, "no regular expression"),
        ({"use_rslora": "false"}, "`use_rslora` must be true or false; got 'false'"),
        ({"use_dora": "false"}, "`use_dora` must be true or false; got 'false'"),
        ({"r": None}, "needs `r`, which is missing"),
        ({"r": True}, "`r` must be an integer"),
        ({"lora_alpha": True}, "`lora_alpha` must be a number"),
        ({"init_lora_weights": 1}, "`init_lora_weights` 1, which changes"),
        ({"revision": 3}, "`revision` must be a text"),
        ({"rank_pattern": {"(": 4}}, "'\\(', which is no regular expression"),
        ({"base_model_name_or_path": None}, "names no base model; got None. Set"),
        ({"base_model_name_or_path": " "}, "names no base model"),
        ({"base_model_name_or_path": "x"}, "'x' is neither a directory.* Set `base_"),
        ({"base_model_name_or_path": "/gone/x"}, "'/gone/x' is neither .* Set `base_"),
        ({"base_model_name_or_path": "."}, "itself an adapter: .*kvjax convert"),
    ],
)
def test_settings_that_are_not_plain_lora(one, settings, match):
    fails(adapter(one, {Q: 4}, **settings), match)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({key(Q, "B"): None}, "lora_A.weight' and not its other half"),
        ({key(Q, "A"): np.ones((4, 15), "f4")}, r"of \[\(4, 15\), \(16, 4\)\] for"),
        ({key(Q, "A"): np.ones((4,), "f4")}, "lora_A and lora_B of"),
        (
            {key(Q, "A").replace(".weight", ".default.weight"): np.ones((4, 16), "f4")},
            "lora_A.default.weight' and .*lora_A.weight', which are the same matrix",
        ),
        (
            {key(Q, "A"): np.full((4, 16), 3e38, "f4"), key(Q, "B"): np.ones((16, 4))},
            f"{FILE} into '{Q}' overflows",
        ),
        ({key(Q, "A"): np.ones((4, 16), "i4")}, "is I32; expected F32"),
        (
            {key(Q, "A"): np.full((4, 16), np.nan, "f4")},
            f"A.weight' in .*{FILE} holds N",
        ),
        ({"base_model.model.lm_head.weight": np.ones((2, 2), "f4")}, "lm_head.weight'"),
        (
            {key(Q, "A").replace("lora_A", "lora_magnitude_vector"): np.ones(16, "f4")},
            "mag",
        ),
        (
            {key("model.layers.9.mlp.up_proj.weight", "A"): np.ones((4, 4), "f4")},
            "layers.9.mlp.up_proj.weight', which the base .* lacks. Did you mean",
        ),
    ],
)
def test_tensors_that_do_not_fit(one, edit, match):
    folder = adapter(one, {Q: 4})
    tensors = dict(load_file(folder / FILE)) | edit
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / FILE)
    fails(folder, match)


def test_folders_that_are_not_one_thing(one):
    folder = adapter(one, {Q: 4})
    (folder / FILE).rename(folder / "adapter_model.bin")
    fails(folder, f"no {FILE}; its .bin is pickled")
    (folder / "adapter_model.bin").unlink()
    fails(folder, f"has {CONFIG} and no {FILE}. Save it")
    save_file({}, folder / FILE)
    fails(folder, f"{FILE} holds no tensors")
    (folder / FILE).write_bytes(b"cut off")
    fails(folder, f"{FILE} is not a complete safetensors file")
    (folder / CONFIG).write_text("[]")
    fails(folder, f"{CONFIG} must hold a JSON object")
    adapter(one, {Q: 4})
    shutil.copy(one / SINGLE, folder / SINGLE)
    fails(folder, f"an adapter .{CONFIG}. and a whole model .{SINGLE}")


def test_the_base_is_quantised(one):
    """FP8 merges; for others, the message is that of the base model."""
    folder = adapter(one, {Q: 4})
    rewrite(one, lambda held: held.update({Q[:-6] + "qweight": np.ones(2, "i4")}))
    fails(folder, f"GPTQ or AWQ.*{one.name}/{SINGLE}")
