"""`kvjax plan` from the outside: exit codes, the sentence first, JSON, a figure."""

import json

import pytest

from kvjax.cli.plan import bytes_of, mesh_of
from kvjax.planning import Plan

WORDS = ("plan", "--context", "512", "--compression", "none,snapkv")


def test_it_fits(kvjax, checkpoint, tmp_path):
    file = tmp_path / "figures" / "plan.png"
    code, out, _ = kvjax(*WORDS, "--model", str(checkpoint), "--plot", str(file))
    assert code == 0 and file.read_bytes().startswith(b"\x89PNG")
    first, *_ = out.splitlines()
    assert first.startswith("model, 512 tokens, batch 1 on here (") and "fits" in first
    assert "snapkv keep 0.25" in out and "~ formula" in out


def test_a_path_is_no_markup(kvjax, checkpoint, tmp_path):
    file = tmp_path / "[" / "bold].yaml"
    file.parent.mkdir()
    file.write_text("store: {residual: 16}\n")
    words = ("plan", "--context", "512", "--compression", str(file), "--progress")
    code, out, err = kvjax(*words, "--model", str(checkpoint))
    assert code == 0 and "[/bold].yaml" in out, err


def test_nothing_fits(kvjax, checkpoint):
    how = ("--model", str(checkpoint), "--memory", "0.08MB", "--device", "v5e")
    code, out, _ = kvjax(*WORDS, *how)
    first = out.splitlines()[0]
    assert code == 1 and "does not fit (needs" in first
    assert "Chips with room" in first


def test_as_json(kvjax, checkpoint):
    how = ("--device", "v5e,v6e", "--keep", "0.5", "--json")
    code, out, _ = kvjax(*WORDS, "--model", str(checkpoint), *how)
    found = Plan.of_tree(json.loads(out))
    assert code == 0 and [chip.name for chip in found.chips] == ["v5e", "v6e"]
    assert {row.device for row in found.rows} == {"v5e", "v6e"}
    assert "largest context" in found.table()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--context", "100000"), "the model's range is 512"),
        (("--device", "v9"), "Unknown device"),
        (("--memory", "80GB", "--device", "v5e"), "v5e can have 16,911,433,728"),
        (("--mesh", "model"), "as in data=2,model=4"),
        (("--memory", "50kB"), "expected a size"),
        (("--plot", "plan.txt"), "ends on .png"),
        (("--plot", "{file}/plan.png"), "is a file"),
    ],
)
def test_wrong_input(kvjax, checkpoint, words, said):
    words = [word.format(file=checkpoint / "config.json") for word in words]
    code, out, err = kvjax("plan", "--model", str(checkpoint), *words)
    assert code == 2 and said in " ".join(err.split()) and not out


def test_an_unknown_architecture_is_refused(kvjax, tmp_path):
    config = {"model_type": "mamba", "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = kvjax("plan", "--model", str(tmp_path), "--device", "v5e")
    assert code == 2 and "'mamba' is not supported" in err


def test_sizes_and_meshes():
    assert bytes_of("12GB") == 12 * 10**9 and bytes_of("1.5 GiB") == 3 << 29
    assert mesh_of("data=2, model=4") == {"data": 2, "model": 4}
    for wrong in ("", "data", "data=x", "data=1,data=2"):
        with pytest.raises(ValueError, match="expected sizes by axis"):
            mesh_of(wrong)
