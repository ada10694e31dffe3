"""Adapters whose config says which modules have updates: PEFT goes by it, so do we."""

import pytest

from tests.faults.files import HEAD, fails
from tests.faults.test_adapters import Q, adapter, agrees, merged


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layers_to_transform": [1, 2]}, r"`layers_to_transform` \[1, 2\]"),
        ({"layers_to_transform": 1}, r"`layers_to_transform` \[1\]"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "`layers_to_transform`"),
        ({"layers_to_transform": "0"}, "`layers_to_transform` must be an integer"),
        ({"layers_to_transform": [-1]}, "`layers_to_transform.*must be an integer"),
        ({"layers_to_transform": [True]}, "`layers_to_transform.*must be an integer"),
        ({"layers_to_transform": [0], "layers_pattern": 3}, "`layers_pattern` must be"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "no regular expression"),
        ({"exclude_modules": ["q_proj"]}, r"leaves out \(`exclude_modules`\)"),
        ({"exclude_modules": ["self_attn.q_proj", "x"]}, "leaves out"),
        ({"exclude_modules": [Q.removesuffix(".weight")]}, "leaves out"),
        ({"exclude_modules": r".*\.q_proj"}, "leaves out"),
        ({"exclude_modules": 3}, "`exclude_modules` must be"),
        ({"exclude_modules": [3]}, "`exclude_modules.*must be a text"),
        ({"exclude_modules": "(.+)+Z"}, "Name the modules one by one"),
    ],
)
def test_tensors_that_the_config_leaves_out(one, settings, match):
    fails(adapter(one, {Q: 4}, **settings), match)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [0], "layers_pattern": None},
        {"layers_to_transform": 0, "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": [], "exclude_modules": []},
        {"layers_to_transform": None, "exclude_modules": None},
        {"exclude_modules": ["proj", "k_proj", "1.self_attn.q_proj"]},
        {"exclude_modules": "q_proj"},
        {"exclude_modules": ""},
    ],
)
def test_tensors_that_the_config_has(one, tmp_path, settings):
    folder = adapter(one, {Q: 4}, **settings)
    agrees(folder, merged(one, folder, {Q: 1.5}), tmp_path)


def test_the_head_is_in_no_layer(one):
    fails(adapter(one, {HEAD: 4}, layers_to_transform=[0, 1, 2]), "lm_head.*leaves out")
