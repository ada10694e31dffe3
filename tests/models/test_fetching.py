"""Published models: fetched from the hub or out of wheels, kept, and found by name."""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import zipfile
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.models import Decoder, fetching, published, save
from kvjax.models.bundled import model_directory, shape_of
from kvjax.models.published import PUBLISHED, SOURCE, Published, Wheel, source_of
from tests.gguf_files import write_gguf
from tests.models.test_gguf import CASES, parameters

pytest.importorskip("gguf", reason="no gguf: pip install kvjax[gguf]")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> pathlib.Path:
    """An index: the wheels of a small model in two parts, and of one with a notice."""
    folder = tmp_path_factory.mktemp("shelf")
    model = Decoder(CASES["qwen3"], dtype=jnp.float32, rngs=nnx.Rngs(0))
    raw = write_gguf(folder / "tiny.gguf", model).read_bytes()
    halves = {"one": raw[:1000], "two": raw[1000:]}
    for name, data in halves.items():
        with zipfile.ZipFile(folder / f"tiny_{name}-1.0-py3-none-any.whl", "w") as file:
            file.writestr(f"tiny_{name}/tiny.part", data)
            file.writestr(f"tiny_{name}/NOTICE.md", "a notice")
            # Never run: it would end the test.
            file.writestr(f"tiny_{name}/__init__.py", "raise SystemExit")
    return folder


def wheel(shelf: pathlib.Path, half: str, **fields) -> Wheel:
    file = shelf / f"tiny_{half}-1.0-py3-none-any.whl"
    given: dict[str, Any] = {
        "name": f"tiny-{half}",
        "version": "1.0",
        "sha256": sha256(file.read_bytes()),
        "member": f"tiny_{half}/tiny.part",
    }
    return Wheel(**(given | fields))


@pytest.fixture
def tiny(shelf, tmp_path, monkeypatch) -> Published:
    """The one published model, an index that has it, and a hub that is not there."""
    model = Published(
        title="Tiny",
        hub="nobody/tiny",
        wheels=(
            wheel(shelf, "one"),
            wheel(shelf, "two", kept=("tiny_two/NOTICE.md",)),
        ),
        file="tiny.gguf",
        sha256=sha256((shelf / "tiny.gguf").read_bytes()),
        licence="CC0-1.0",
    )

    def bring(requirement: str, folder: pathlib.Path) -> None:
        name = requirement.partition("==")[0].replace("-", "_")
        file = shelf / f"{name}-1.0-py3-none-any.whl"
        (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setenv("KVJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "_pip", bring)
    monkeypatch.setattr(fetching, "checkpoint_directory", no_hub)
    offer(monkeypatch, model)
    return model


def no_hub(name: str) -> pathlib.Path:
    raise ValueError(f"{name!r} could not be fetched from the hub: no network")


def offer(monkeypatch, model: Published) -> None:
    monkeypatch.setattr(published, "PUBLISHED", MappingProxyType({"tiny": model}))


def test_from_the_index(tiny, tmp_path):
    with pytest.raises(ValueError, match="'tiny' .*has not been .* `kvjax fetch tiny`"):
        kvjax.load("tiny")
    with pytest.raises(ValueError, match="has not been fetched"):
        model_directory("tiny")
    said: list[str] = []
    found = fetching.fetch("tiny", say=said.append)
    assert found.new and found.directory == tmp_path / "cache" / "models" / "tiny"
    assert "cannot be had from the hub (no network). Taking it from the pack" in said[0]
    assert (found.directory / "NOTICE.md").read_text() == "a notice"
    assert not [*found.directory.parent.glob(".*")]
    # The model, by its name, in all that takes one.
    model, tokenizer = kvjax.load("tiny", "float32")
    wanted = Decoder(CASES["qwen3"], dtype=jnp.float32, rngs=nnx.Rngs(0))
    for name, value in parameters(wanted).items():
        np.testing.assert_array_equal(parameters(model)[name], value)
    assert tokenizer.decode([5]) == "word1"
    assert model_directory("tiny") == str(found.directory)
    assert shape_of("tiny") == model.config
    # Where it is from.
    record = json.loads((found.directory / SOURCE).read_text())
    assert record["from"] == "package index, tiny-one==1.0 and 1 more"
    assert record["sha256"] == tiny.sha256
    assert source_of(found.directory) == ", ".join(
        ["Tiny", record["from"], "tiny.gguf", f"sha256 {tiny.sha256}", "CC0-1.0"]
    )
    assert source_of(tmp_path) == ""
    # Once is enough.
    before = {path: path.stat().st_mtime_ns for path in found.directory.iterdir()}
    again = fetching.fetch("tiny", say=said.append)
    assert not again.new and again.directory == found.directory
    assert before == {p: p.stat().st_mtime_ns for p in found.directory.iterdir()}


def test_a_directory_of_that_name_comes_first(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Decoder(CASES["llama"], dtype=jnp.float32, rngs=nnx.Rngs(0))
    save(model, tmp_path / "tiny")
    assert kvjax.load("tiny", tokenizer=False)[0].config == model.config
    assert model_directory("tiny") == "tiny"


def test_from_the_hub(tiny, tmp_path, monkeypatch):
    model = Decoder(CASES["llama"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokenizer = fetching.load(write_gguf(tmp_path / "x.gguf", model))[1]
    save(model, tmp_path / "5f0d1a7", tokenizer)
    monkeypatch.setattr(
        fetching, "checkpoint_directory", lambda _: tmp_path / "5f0d1a7"
    )
    monkeypatch.setattr(fetching, "_pip", None)
    found = fetching.fetch("tiny", out=tmp_path / "out")
    assert found.directory == tmp_path / "out"
    assert kvjax.load(found.directory, "bfloat16")[0].dtype == jnp.bfloat16
    said = source_of(found.directory)
    assert said == "Tiny, Hugging Face hub, nobody/tiny, 5f0d1a7, CC0-1.0"


def test_what_the_hub_says(tiny, monkeypatch):
    with pytest.raises(ValueError, match="nobody/tiny cannot be had from the hub"):
        fetching.fetch("tiny", origin="hub")

    class GatedRepoError(Exception):
        pass

    def gated(name: str) -> pathlib.Path:
        raise ValueError("could not be fetched from the hub: no") from GatedRepoError()

    monkeypatch.setattr(fetching, "checkpoint_directory", gated)
    with pytest.raises(ValueError, match="accept them, and log in"):
        fetching.fetch("tiny", origin="hub")
    said: list[str] = []
    assert fetching.fetch("tiny", say=said.append).new
    assert "log in (`hf auth login`). Taking it from the package index" in said[0]


def test_terms_are_accepted_or_nothing_is_fetched(tiny, tmp_path, monkeypatch):
    terms = dataclasses.replace(tiny, terms="https://example.org/terms")
    offer(monkeypatch, terms)
    for origin in fetching.ORIGINS:
        with pytest.raises(ValueError, match="example.org/terms.*--accept-terms"):
            fetching.fetch("tiny", origin=origin)
    assert not (tmp_path / "cache").exists()
    found = fetching.fetch("tiny", accept_terms=True)
    record = json.loads((found.directory / SOURCE).read_text())
    assert record["terms"] == "https://example.org/terms"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sha256": "0" * 64}, "tiny.gguf out of .* has the sha256 .*; expected 000"),
        (
            {"wheels": {"sha256": "0" * 64}},
            "tiny_one-1.0.* has the sha256 .*expected 0",
        ),
        ({"wheels": {"member": "x/y"}}, "tiny_one-1.0.* does not hold 'x/y'"),
        ({"wheels": {"name": "tiny-two"}}, "tiny_two-1.0.* has the sha256"),
    ],
)
def test_another_file_than_the_published_one(
    tiny, shelf, tmp_path, monkeypatch, change, match
):
    if "wheels" in change:
        change = {"wheels": (wheel(shelf, "one", **change["wheels"]), *tiny.wheels[1:])}
    offer(monkeypatch, dataclasses.replace(tiny, **change))
    with pytest.raises(ValueError, match=match):
        fetching.fetch("tiny", origin="index")
    assert not [*(tmp_path / "cache").glob("**/*.*")]


def test_an_interrupted_download_leaves_nothing(tiny, tmp_path, monkeypatch):
    bring, calls = fetching._pip, []

    def stopped(requirement: str, folder: pathlib.Path) -> None:
        calls.append(requirement)
        if len(calls) == 2:
            raise KeyboardInterrupt
        bring(requirement, folder)

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_pip", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetching.fetch("tiny")
    assert not (tmp_path / "cache").exists()
    # What a kill leaves goes away with the next call.
    left = tmp_path / "cache" / "models" / ".tiny.abc.tmp"
    left.mkdir(parents=True)
    (left / "tiny.gguf").write_bytes(b"GGUF")
    assert fetching.fetch("tiny").new and not left.exists()
    other = tmp_path / ".other.mine.tmp"
    other.mkdir()
    assert fetching.fetch("tiny", out=tmp_path / "*").new and other.exists()


def test_places_that_hold_something_else(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is not empty, and holds no model"):
        fetching.fetch("tiny", out=tmp_path / "out")
    with pytest.raises(ValueError, match="notes.txt.* cannot be written to as a dir"):
        fetching.fetch("tiny", out=tmp_path / "out" / "notes.txt")
    mine = tmp_path / "mine"
    save(Decoder(CASES["llama"], dtype=jnp.float32, rngs=nnx.Rngs(0)), mine)
    with pytest.raises(ValueError, match=f"mine holds a model without {SOURCE}, not T"):
        fetching.fetch("tiny", out=mine)
    for text, said in (('{"model": "Tall"}', "holds 'Tall'"), ("{", "is not JSON")):
        (mine / SOURCE).write_text(text)
        with pytest.raises(ValueError, match=said):
            fetching.fetch("tiny", out=mine)
    with pytest.raises(ValueError, match="too long"):
        fetching.fetch("tiny", out="x" * 300)
    with pytest.raises(
        ValueError, match=r"no model 'tinny' to fetch.*Did you mean 'ti"
    ):
        fetching.fetch("tinny")
    with pytest.raises(ValueError, match="`origin` must be one of"):
        fetching.fetch("tiny", origin="web")


def test_without_pip(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    with pytest.raises(ValueError, match="has no pip.*ensurepip.*--from hub"):
        fetching._pip("tiny-one==1.0", tmp_path)


def test_a_pip_that_finds_nothing(tmp_path, monkeypatch):
    pytest.importorskip("pip", reason="this interpreter has no pip")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="pip could not download no-such-tiny==1.0: .*"
    ):
        fetching._pip("no-such-tiny==1.0", tmp_path)


def test_pip_brings_a_wheel_and_installs_nothing(shelf, tmp_path, monkeypatch):
    """The real one, from a folder."""
    pytest.importorskip("pip", reason="this interpreter has no pip")
    made = tmp_path / "links" / "tinyone-1.0-py3-none-any.whl"
    made.parent.mkdir()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("tinyone/x.part", "data")
        info = "tinyone-1.0.dist-info"
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyone\nVersion: 1.0\n"
        )
        file.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.parent))
    (tmp_path / "to").mkdir()
    fetching._pip("tinyone==1.0", tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == [made.name]
    assert importlib.util.find_spec("tinyone") is None


def test_the_table():
    """Of the real models: nothing is missing that a fetch would miss late."""
    for name, model in PUBLISHED.items():
        assert name.replace("-", "").isalnum() and "/" in model.hub
        assert any(one.member for one in model.wheels)
        for sha in (model.sha256, *(one.sha256 for one in model.wheels)):
            assert len(sha) == 64 and int(sha, 16)


def test_a_cache_without_a_home(monkeypatch):
    monkeypatch.setenv("KVJAX_CACHE_DIR", "~nobody-has-this-name/x")
    with pytest.raises(
        ValueError, match="no place for fetched models.*KVJAX_CACHE_DIR"
    ):
        published.place_of("smollm2")


def test_the_command(tiny, tmp_path, capsys):
    from kvjax.cli import main

    assert main(["fetch", "tiny"]) == 0
    out, err = capsys.readouterr()
    place = tmp_path / "cache" / "models" / "tiny"
    assert out.startswith(f"{place}\nTiny, package index, tiny-one==1.0")
    assert "--model tiny" in out and "nobody/tiny cannot be had from the hub" in err
    assert main(["fetch", "tiny", "--json"]) == 0
    result = json.loads(capsys.readouterr()[0])
    assert result["new"] is False and result["directory"] == str(place)
    assert main(["fetch", "tiny"]) == 0 and "(was there)" in capsys.readouterr()[0]
    assert main(["fetch", "tiny", "--from", "hub", "--out", str(tmp_path / "x")]) == 2
    assert "cannot be had from the hub" in capsys.readouterr()[1]
    assert main(["fetch", "other"]) == 2
    assert "no model 'other' to fetch" in capsys.readouterr()[1]
    words = ["--prompt", "word1", "--max-new-tokens", "1", "--dtype", "float32"]
    assert main(["generate", "--model", "tiny", *words]) == 0
