"""`config.json` and the files beside it with seeded faults: a model, or words why not.

The outcome of a mutant is a model, or a `ValueError` that names the file and says what
was expected. Never another exception, and no message longer than a screen.
"""

import importlib
import json
import os
import pathlib
import random
import shutil
import zipfile

import pytest

from kvjax.cli.main import main
from kvjax.models import load, save
from kvjax.models import weights as weights_module
from kvjax.models.families import read_config
from kvjax.models.io import load_config
from kvjax.train.data.tokenizer import build_tokenizer
from tests.faults.mutants import as_json, changed, damaged
from tests.models.samples import CONFIGS, sample

FAST, ALL = 60, 1500
SCALINGS = {
    "llama": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "mistral": {"type": "linear", "factor": 2.0},
    "qwen2": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1},
    "qwen3": {"type": "dynamic", "factor": 2.0},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A small checkpoint of each family, in shards, with a tokenizer."""
    root = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "SHARD_BYTES", 20_000)
        for name in CONFIGS:
            save(sample(name), root / name, build_tokenizer())
            path = root / name / "config.json"
            tree = json.loads(path.read_text())
            if name in SCALINGS:
                tree["rope_scaling"] = SCALINGS[name]
            tree["kvjax_evictor"] = None
            path.write_text(json.dumps(tree, indent=1))
    return {name: root / name for name in CONFIGS}


def outcome(folder: pathlib.Path, file: str, seed: object, tokenizer=False) -> bool:
    """Whether the checkpoint was loaded; a refusal names the file."""
    try:
        load(folder, "float32", tokenizer=tokenizer)
    except ValueError as wrong:
        said = str(wrong)
        assert str(folder) in said or file in said, (seed, said)
        assert 20 < len(said) < 2500, (seed, said)
        return False
    return True


def mutants(
    folders: dict[str, pathlib.Path], tmp_path: pathlib.Path, file: str, count: int
) -> int:
    """Load `count` checkpoints in which `file` was changed; how many were refused."""
    refused = 0
    for number in range(count):
        rng = random.Random(f"{file}/{number}")
        source = folders[rng.choice(sorted(folders))]
        folder = tmp_path / "one"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, copy_function=os.link)
        data = (source / file).read_bytes()
        if rng.random() < 0.8:
            data = as_json(changed(rng, json.loads(data)))
        else:
            data = damaged(rng, data)
        (folder / file).unlink()
        (folder / file).write_bytes(data)
        seed = f"{file}/{number}"
        refused += not outcome(folder, file, seed, tokenizer="token" in file)
    return refused


FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
)


@pytest.mark.parametrize("file", FILES)
def test_files_with_faults(file, folders, tmp_path):
    assert mutants(folders, tmp_path, file, FAST) > FAST // 8


@pytest.mark.slow
@pytest.mark.sweep(0, 1)
@pytest.mark.parametrize("file", FILES)
def test_many_files_with_faults(file, folders, tmp_path):
    assert mutants(folders, tmp_path, file, ALL) > ALL // 8


@pytest.mark.slow
@pytest.mark.sweep(0, 0)
def test_tokenizers_with_faults(folders, tmp_path):
    assert mutants(folders, tmp_path, "tokenizer.json", 200) > 20


def test_configs_with_faults_need_no_weights(folders):
    """Thousands of them in a second: nothing is built before all is checked."""
    refused = 0
    for number in range(1000):
        rng = random.Random(f"config/{number}")
        source = folders[rng.choice(sorted(folders))] / "config.json"
        tree = changed(rng, json.loads(source.read_text()))
        try:
            read_config(tree)
        except ValueError as wrong:
            refused += 1
            assert 10 < len(str(wrong)) < 1500, (number, wrong)
    assert refused > 300


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_file_is_not_waited_for(file, kind, folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    (folder / file).unlink()
    if kind == "pipe":
        os.mkfifo(folder / file)
    elif kind == "device":
        (folder / file).symlink_to("/dev/zero")
    else:
        (folder / file).mkdir()
    with pytest.raises(ValueError, match=f"{file}.*(pipe, a socket|a directory)"):
        load_config(folder)


def test_weights_may_be_links_and_no_pipes(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    shard = sorted(folder.glob("*.safetensors"))[0]
    away = shutil.move(shard, tmp_path / "blob")
    shard.symlink_to(away)
    load(folder, tokenizer=False)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ValueError, match=shard.name):
        load(folder, tokenizer=False)


@pytest.mark.parametrize("layers", [2_000, 10**9, 10**30])
def test_layers_that_are_not_there_are_not_built(layers, folders, tmp_path, capsys):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    tree = json.loads((folder / "config.json").read_text())
    tree["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(tree))
    assert main(["generate", "--model", str(folder), "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert "num_hidden_layers" in said or "lacks" in said
    assert len(said) < 1000


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["gzip", "bz2", "lzma", "zip"])
def test_packed_files(file, kind, folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    data = (folder / file).read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(file, data)
    else:
        (folder / file).write_bytes(importlib.import_module(kind).compress(data))
    with pytest.raises(ValueError, match=rf"{file} is packed \(.*Unpack it") as said:
        load_config(folder)
    assert str(said.value).count(file) == 1


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}', '{"top_p": 3}'])
def test_a_generation_config_is_named_once(text, folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder)) as said:
        load_config(folder)
    assert str(said.value).count("generation_config.json") == 1
