"""Meshes and rules that `load` does not take: named before a weight is read."""

import jax
import pytest
from jax.sharding import AbstractMesh

import kvjax
from kvjax.models.bundled import model_directory
from kvjax.models.sharding import RULES, TRAINING, check_heads, parameter_sharding

TINY = model_directory("kvjax-tiny")
MESH = jax.make_mesh((1, 1), ("data", "model"))


def loaded(mesh, rules=RULES):
    return kvjax.load(TINY, tokenizer=False, mesh=mesh, rules=rules)


@pytest.mark.parametrize(
    "mesh",
    [
        AbstractMesh((1,), ("model",)),
        {"model": 1},
        "model",
        jax.devices(),
        (),
        0,
        jax.sharding.Mesh([], ("model",)),
    ],
    ids=repr,
)
def test_meshes_that_are_none(mesh):
    with pytest.raises(ValueError, match=r"`mesh` must be a jax\.sharding\.Mesh"):
        loaded(mesh)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (None, "must map logical axes"),
        ("model", "must map logical axes"),
        ([("heads", "model")], "must map logical axes"),
        ({"haeds": "model"}, "'haeds'.*Did you mean 'heads'"),
        ({3: "model"}, "no logical axis 3"),
        ({("heads",): "model"}, "no logical axis"),
        ({"heads": 3}, r"rules\['heads'\]` must be the name"),
        ({"heads": ["model"]}, r"rules\['heads'\]` must be the name"),
        ({"heads": {"model"}}, r"rules\['heads'\]` must be the name"),
        ({"heads": "modle"}, "'modle'.*Did you mean 'model'"),
        ({"heads": ("data", "modle")}, "'modle'.*Did you mean 'model'"),
        ({"heads": ("data", 3)}, "names 3, which is no axis"),
        ({"heads": ("model", "model")}, "'model' twice: as 'heads' and as 'heads'"),
        ({**RULES, "embed": "model"}, "'model' twice: as 'vocab' and as 'embed'"),
        ({**RULES, "embed": ("data", "model")}, "'model' twice"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_rules_that_are_none(rules, words):
    """A name that was misspelt used to split nothing, without a word."""
    with pytest.raises(ValueError, match=words):
        loaded(MESH, rules)


def test_rules_that_are_some():
    """Those of a table may name axes that a mesh lacks; a part of the rules is some."""
    one = jax.make_mesh((1,), ("x",))
    whole = {**RULES, "heads": None}
    for rules in (RULES, TRAINING, {}, {"heads": "x"}, {"mlp": ("x",)}, whole):
        check_heads(4, 2, one, rules)


def test_a_basis_is_square():
    check_heads(4, 2, MESH, {"head_dim": "model"})
    with pytest.raises(ValueError, match="key_basis by mesh axis 'model' twice"):
        path = "layers.attention.key_basis"
        parameter_sharding(path, (2, 2, 4, 4), MESH, {"head_dim": "model"})
