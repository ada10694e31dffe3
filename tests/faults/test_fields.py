"""Every field of every component, recipe and evaluation, given what it cannot hold.

Driven by the classes themselves: a new component, or a new field, is tested the day it
is added.
"""

import dataclasses
import importlib
import pkgutil
import typing
from typing import Annotated, Any

import pytest

import kvjax
from kvjax.compress.presets import COMPONENTS, compression, compressions
from kvjax.config import decode, encode
from kvjax.eval.config import bundled_evaluations
from kvjax.eval.config import load_config as load_evaluation
from kvjax.fields import Checked, OneOf, Range, fit, hints_of
from kvjax.train.recipe import bundled_recipes
from kvjax.train.recipe import load_config as load_recipe

NEVER = (float("nan"), float("inf"), "x", [1], {"a": 1}, 10**30, 1e300, object())
"""What no number is."""


def every() -> list[type]:
    """All dataclasses that hold themselves to their annotations."""
    for module in pkgutil.walk_packages(kvjax.__path__, "kvjax."):
        if not module.name.startswith(("kvjax.cli.__main__", "kvjax.eval.lm")):
            importlib.import_module(module.name)
    found, waiting = [], [Checked]
    while waiting:
        waiting += waiting.pop().__subclasses__()
        found += [cls for cls in waiting if dataclasses.is_dataclass(cls)]
    own = [cls for cls in dict.fromkeys(found) if cls.__module__.startswith("kvjax")]
    return sorted(own, key=lambda cls: (cls.__module__, cls.__name__))


CLASSES = every()


def options(hint: Any) -> list[Any]:
    """The scalars in a hint, bare."""
    if typing.get_origin(hint) is Annotated:
        return options(typing.get_args(hint)[0])
    if typing.get_args(hint) and typing.get_origin(hint) not in (tuple, dict):
        return [one for inner in typing.get_args(hint) for one in options(inner)]
    return [hint]


def rules(hint: Any, kind: type) -> list[Any]:
    """The rules of that kind in a hint, members of a union included."""
    found = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, kind)]
    for inner in typing.get_args(hint):
        found += rules(inner, kind)
    return found


def wrong(hint: Any) -> list[Any]:
    """What the field cannot hold."""
    kinds = options(hint)
    if int in kinds or float in kinds:
        never = [one for one in NEVER if one not in ([1], "x") or str not in kinds]
        odd = [True] + ([0.5] if float not in kinds else [])
        for rule in rules(hint, Range):
            odd += [] if rule.least is None else [rule.least - 1]
            odd += [] if rule.above is None else [rule.above]
            odd += [] if rule.most is None else [rule.most + 1]
        return never + odd
    if bool in kinds:
        return [0, "yes", None] if type(None) not in kinds else [0, "yes"]
    if str in kinds:
        return [1, ["a"], "\ud800"] + (["no such"] if rules(hint, OneOf) else [])
    if typing.get_origin(hint) is tuple:
        return [1, "ab", {"a": 1}, [object()]]
    if typing.get_origin(hint) is dict:
        return [1, "ab", [1]]
    return [1, "ab", [1]]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_refuses_what_it_cannot_hold(cls):
    for name, hint in hints_of(cls).items():
        for value in [] if hint is Any else wrong(hint):
            try:
                found = fit(value, hint, name)
            except ValueError as said:
                assert name in str(said) and len(str(said)) < 1000
            else:
                raise AssertionError(f"`{name}` holds {value!r} as {found!r}")


def test_constructors_are_held_to_it():
    """No `__post_init__` of a subclass leaves the check out."""
    for cls in CLASSES:
        own = [one for one in cls.__mro__ if "__post_init__" in vars(one)]
        called = [one for one in own if "__post_init__" in _names(one)]
        assert called == own[:-1] and own[-1] is Checked, cls


def _names(cls: type) -> tuple[str, ...]:
    return vars(cls)["__post_init__"].__code__.co_names


@pytest.mark.parametrize("name", compressions())
def test_presets_survive_what_is_written(name):
    c = compression(name)
    assert decode(encode(c, COMPONENTS), type(c), COMPONENTS) == c


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
FILES = {
    "empty": ("", "must hold a mapping"),
    "a list": ("[]", "must hold a mapping"),
    "false": ("false", "must hold a mapping"),
    "zero": ("0", "must hold a mapping"),
    "a text": ("snapkv", "must hold a mapping"),
    "two documents": ("a: 1\n---\nb: 2\n", "not YAML"),
    "an alias bomb": (BOMB, "unfolds into more than"),
    "an alias of itself": ("a: &a [*a]\n", "inside of what it is an alias of"),
    "a key twice": ("seed: 1\nitems: 2\nseed: 3\n", "'seed' stands twice.*line 3"),
    "deep nesting": ("[" * 20_000, "nested too deeply"),
    "a tag": ("a: !!python/object:os.system x\n", "not YAML"),
    "a key that is a list": ("? [1, 2]\n: 3\n", "not YAML|unhashable"),
    "half a character": ('a: "\\ud800"\n', "not YAML|half|has no field"),
    "digits without end": (f"a: {'9' * 6000}\n", "not YAML"),
    "cut off": ('a: "b\n', "not YAML"),
    "a NUL": ("a: b\0c\n", "not YAML"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "load",
    [compression, load_evaluation, load_recipe],
    ids=["compression", "evaluation", "recipe"],
)
def test_files_that_are_no_settings(load, kind, tmp_path):
    text, says = FILES[kind]
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as said:
        load(path)
    assert "settings.yaml" in str(said.value) and len(str(said.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_settings_of_another_encoding(encoding, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes("evict: # für\n".encode(encoding))
    with pytest.raises(ValueError, match="settings.yaml.*UTF-8"):
        compression(path)


def test_numbers_that_yaml_used_to_read_as_texts(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("evict: {score: knorm, budget: {type: uniform, keep: 1e-1}}\n")
    found = compression(path).evict
    assert found is not None and found.budget.keep == 0.1


def test_what_comes_with_the_package_is_read():
    assert all(load_evaluation(name) for name in bundled_evaluations())
    assert all(load_recipe(name) for name in bundled_recipes())
