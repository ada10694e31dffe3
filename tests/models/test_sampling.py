"""What `generate` is told of drawing: anything wrong is named before any compute."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.models import generation
from kvjax.models.sampling import Sampling
from tests.models.samples import sample
from tests.typecheck import wrong_types

pytestmark = wrong_types

NUMBERS = [float("nan"), float("inf"), -1, True, "1", None, [1], 1j, 10**400]
WHOLE = [0, -1, 1.5, float("nan"), True, "5", 10**30, 10**5000, [3]]


_few: dict[str, Any] = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return sample("llama")


@pytest.fixture(autouse=True)
def _no_compute(monkeypatch):
    def compute(*_, **__):
        raise AssertionError("this was to be refused")

    monkeypatch.setattr(generation, "prefill", compute)


def refused(name: str, model, **options: Any) -> None:
    tokens = np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match=f"`{name}") as said:
        kvjax.generate(model, tokens, **_few | options)
    assert len(str(said.value)) < 300


@pytest.mark.parametrize("value", [*NUMBERS, 1e-30], ids=lambda v: str(v)[:9])
def test_temperatures(model, value):
    refused("temperature", model, temperature=value)


@pytest.mark.parametrize("value", WHOLE, ids=lambda v: repr(type(v)))
def test_top_k(model, value):
    refused("top_k", model, temperature=1.0, top_k=value)


@pytest.mark.parametrize(
    "value", [*(v for v in NUMBERS if v is not None), 0, 1.01], ids=lambda v: str(v)[:9]
)
def test_top_p(model, value):
    refused("top_p", model, temperature=1.0, top_p=value)


@pytest.mark.parametrize("value", [*WHOLE, None], ids=lambda v: repr(type(v)))
def test_max_new_tokens(model, value):
    refused("max_new_tokens", model, max_new_tokens=value)


def test_more_tokens_than_the_model_has_positions(model):
    refused("max_new_tokens", model, max_new_tokens=2**31 - 1)


@pytest.mark.parametrize(
    "value", [5, "]", [1.5], [True], ["]"], [10**30], None, [None]], ids=str
)
def test_stop_tokens(model, value):
    refused("stop_tokens", model, stop_tokens=value)


@pytest.mark.parametrize("value", [0, "seed", 1.5, np.random.default_rng(0)], ids=str)
def test_keys(model, value):
    refused("key", model, temperature=1.0, key=value)


def test_values_of_other_types_that_are_meant():
    made = Sampling(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=np.int64(3),  # type: ignore[arg-type]
        top_p=1,
    )
    assert made == Sampling(temperature=0.5, top_k=3, top_p=1.0)
    assert hash(made) == hash(Sampling(temperature=0.5, top_k=3, top_p=1.0))
    logits = jnp.asarray([[0.0, 9.0, 1.0]])
    drawn = jax.jit(made)(logits, jax.random.key(0))
    assert drawn.tolist() == [1]
    given: Any = np.asarray([1, 2])
    config = sample("llama").config
    assert generation._stops(config, given) == (1, 2)
