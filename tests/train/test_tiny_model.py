"""The committed models: small, loadable, and able to do their tasks."""

import pytest

from kvjax.eval.tasks import make_task
from kvjax.models.io import load
from tests.train.greedy import replies

BUNDLED = ("kvjax-tiny", "kvjax-tiny-seed1")  # trained from nothing, used whole


@pytest.fixture(scope="module", params=BUNDLED)
def directory(repo, request):
    return repo / "configs" / "model" / request.param


@pytest.fixture(scope="module")
def loaded(directory):
    return load(directory, dtype="float32")


def test_weights_are_small(directory):
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert size <= 8 * 2**20


def test_shape_is_grouped_query_with_four_layers(loaded):
    config = loaded[0].config
    assert config.num_layers >= 4 and config.num_kv_heads >= 4
    assert config.num_heads > config.num_kv_heads
    assert config.max_positions >= 1024


def test_prompts_start_with_bos(loaded):
    _, tokenizer = loaded
    text = make_task("recall").generate(0, 1, 200)[0].prompt
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id and len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["recall", "chain", "induction", "batch", "fact"])
def test_it_does_its_tasks(loaded, name):
    task = make_task(name)
    items = task.generate(2, 8, 250)
    given = replies(loaded[0], items, task.max_new_tokens)
    scores = [task.score(item, reply) for item, reply in zip(items, given, strict=True)]
    assert sum(scores) / len(scores) >= 0.8
