"""Calls in Python with what they do not take: named before any compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kvjax
from kvjax.models import Decoder
from kvjax.models.generation import generate_from
from kvjax.models.prompts import read_prompt
from kvjax.models.sampling import Sampling
from kvjax.models.shared_pass import read_shared
from kvjax.summary import describe
from tests.small import VOCAB, small_model

TOKENS = np.arange(8)[None]


@pytest.mark.parametrize("name", ["prefill", "generate", "simulate"])
@pytest.mark.parametrize(
    "tokens",
    [
        TOKENS.astype(np.int64) + 2**32,
        TOKENS.astype(np.uint64) + 2**32,
        TOKENS - 2**33,
        [[10**30]],
        [["a"]],
        [[1, 2], [3]],
        "hello",
        None,
        {"input_ids": [[1]]},
        np.array([["2026-01-01"]], "M8[D]"),
        [[True, False]],
    ],
    ids=repr,
)
def test_tokens_that_are_none(name, tokens):
    """Those of 64 bits used to be what their lower halves are."""
    with pytest.raises(ValueError, match="`tokens` must be") as said:
        getattr(kvjax, name)(small_model(), tokens)
    assert len(str(said.value)) < 600


@pytest.mark.parametrize("lengths", [[2**32 + 8], [10**30], ["a"], [8.0], None])
def test_lengths_that_are_none(lengths):
    if lengths is not None:
        with pytest.raises(ValueError, match="`lengths` must be"):
            kvjax.prefill(small_model(), TOKENS, lengths)
        with pytest.raises(ValueError, match="`prompt_lengths` must"):
            kvjax.simulate(small_model(), TOKENS, prompt_lengths=lengths)
    for model in (None, "kvjax-tiny", small_model().config):
        with pytest.raises(ValueError, match="`model` must be a kvjax Decoder"):
            kvjax.prefill(model, TOKENS, lengths)  # type: ignore[arg-type]


def test_room_is_bounded_by_the_models_range():
    model = small_model()

    def shapes(room: int) -> list[tuple[int, ...]]:
        made = jax.eval_shape(lambda: kvjax.prefill(model, TOKENS, max_new_tokens=room))
        return [x.shape for x in jax.tree.leaves(made)]

    assert shapes(10**9) == shapes(model.config.max_positions)


def test_caches_and_logits_of_something_else():
    model = small_model()
    logits, cache = kvjax.prefill(model, TOKENS, max_new_tokens=4)
    for wrong in (None, logits, (logits, cache)):
        with pytest.raises(ValueError, match="`cache` must be a KVCache"):
            kvjax.extend(model, wrong, TOKENS)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`cache` must be a KVCache"):
            generate_from(model, wrong, logits)  # type: ignore[arg-type]
    for wrong in (None, [1.0], logits[0], logits[:, :7], jnp.tile(logits, (2, 1))):
        with pytest.raises(ValueError, match=rf"`logits` .*\[1, {VOCAB}\]"):
            generate_from(model, cache, wrong, max_new_tokens=2)  # type: ignore
    with pytest.raises(ValueError, match="`callback` must be a function"):
        kvjax.generate(model, TOKENS, callback=3)  # type: ignore[arg-type]
    key = jnp.zeros((3,), jnp.uint32)
    with pytest.raises(ValueError, match="`key` must be a random key"):
        kvjax.generate(model, TOKENS, temperature=1.0, key=key)


def test_a_tiny_top_p_takes_the_likeliest_token():
    logits = jnp.asarray([[0.0, 1.0, 9.0, 2.0]])
    for top_p in (1e-6, 1e-30):
        draw = Sampling(temperature=1.0, top_p=top_p)
        assert draw(logits, jax.random.key(0)).tolist() == [2]


@pytest.mark.parametrize(
    "changed",
    [
        {"prefill": {"type": "vertical_slash", "last_q": 2**31 - 1}},
        {"prefill": {"type": "vertical_slash", "block": 16384}},
        {"store.residual": 2**20},
        {"schedule": {"type": "every_tokens", "interval": 10**6}},
        {
            "evict": {
                "score": {"type": "lagkv", "lag": 2**20},
                "budget": {"type": "uniform", "keep": 1},
            }
        },
        {"store.keys": {"type": "think", "window": 2**27}},
    ],
    ids=repr,
)
def test_sizes_that_no_prompt_has(changed):
    """They were allocated as they stood: gigabytes for a prompt of nineteen tokens."""
    with pytest.raises(ValueError, match="must be an integer in"):
        kvjax.compression("none", **changed)


class Frame:
    """What looks like an array and is none until it is made one."""

    def __init__(self, data):
        self.data = np.asarray(data)
        self.shape = self.data.shape

    def __array__(self, dtype=None, copy=None):
        return self.data if dtype is None else self.data.astype(dtype)


def test_logits_in_any_form_are_the_same_numbers():
    """Another byte order used to be read as it stands: other tokens."""
    model = small_model()
    logits, cache = kvjax.prefill(model, TOKENS, max_new_tokens=4)
    plain = np.asarray(logits)
    want = int(np.argmax(plain))
    forms = [plain.astype(kind) for kind in (">f4", ">f8", "f8", np.longdouble)]
    for given in (*forms, Frame(plain), plain.tolist(), logits):
        made = generate_from(model, cache, given, max_new_tokens=1)  # type: ignore
        assert made.tokens.tolist() == [[want]]
    whole = jax.ShapeDtypeStruct(plain.shape, np.float32)
    none = [plain.astype(kind) for kind in (object, "U8", int, bool, complex, "M8[s]")]
    none[0] = np.full(plain.shape, None)
    for given in (*none, whole, plain.tobytes(), {"logits": plain}, iter(plain)):
        with pytest.raises(ValueError, match="`logits` must be numbers") as said:
            generate_from(model, cache, given, max_new_tokens=1)  # type: ignore
        assert len(str(said.value)) < 600
    with pytest.raises(ValueError, match="masked"):
        generate_from(model, cache, np.ma.masked_array(plain), max_new_tokens=1)  # type: ignore


@pytest.mark.parametrize("kind", ["m8[s]", "M8[s]", "masked"])
def test_tokens_that_only_look_like_integers(kind):
    masked = np.ma.masked_array(TOKENS, TOKENS > 3)
    tokens = masked if kind == "masked" else TOKENS.astype(kind)
    for name in ("prefill", "generate", "simulate"):
        with pytest.raises(ValueError, match="`tokens` (must be|is a masked)"):
            getattr(kvjax, name)(small_model(), tokens)
    lengths = np.ma.masked_array([8]) if kind == "masked" else np.array([8], kind)
    with pytest.raises(ValueError, match="`lengths` (must be|is a masked)"):
        kvjax.prefill(small_model(), TOKENS, lengths)


READS = {
    "prefill": lambda m, t, c: kvjax.prefill(m, t, None, c),
    "generate": lambda m, t, c: kvjax.generate(m, t, None, c),
    "simulate": lambda m, t, c: kvjax.simulate(m, t, None, None, c),
    "read_prompt": lambda m, t, c: read_prompt(m, t, None, c),
    "read_shared": lambda m, t, c: read_shared(m, t, None, kvjax.Compression().prefill),
    "gate_slopes": lambda m, t, c: kvjax.gate_slopes(m, t, None, [4]),  # type: ignore
}


@pytest.mark.parametrize("name", READS)
def test_every_way_to_read_a_prompt_checks_the_same(name):
    read, none = READS[name], kvjax.Compression()
    for model in ("m", None, Decoder, small_model().config):
        with pytest.raises(ValueError, match="`model` must be a kvjax Decoder"):
            read(model, TOKENS, none)
    if name in ("read_shared", "gate_slopes"):
        return
    for wrong in (None, "snapkv", kvjax.Compression, {"evict": None}):
        with pytest.raises(ValueError, match="`c` must be a kvjax.Compression"):
            read(small_model(), TOKENS, wrong)
    small = kvjax.compression("snapkv", **{"evict.budget.slots": 4})
    with pytest.raises(ValueError, match="protects"):
        read(small_model(), TOKENS, small)
    for preset in ("dms", "surrogate"):
        with pytest.raises(ValueError, match="has no evictor"):
            read(bare(), TOKENS, kvjax.compression(preset))


@functools.lru_cache
def bare() -> Decoder:
    """A model that gives up nothing."""
    config = dataclasses.replace(small_model().config, evictor=None)
    return Decoder(config, rngs=nnx.Rngs(0))


def test_what_was_read_checks_what_it_is_asked():
    model, none = small_model(), kvjax.Compression()
    passed = read_shared(model, TOKENS, None, none.prefill)
    small = kvjax.compression("snapkv", **{"evict.budget.slots": 4})
    for ask in (passed.prompt, passed.prompt(none).compress):
        for wrong in (None, "snapkv", kvjax.Compression):
            with pytest.raises(ValueError, match="`c` must be a kvjax.Compression"):
                ask(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="protects"):
            ask(small)
    for wrong in ("dense", None, type(none.prefill)):
        with pytest.raises(ValueError, match="`prefill` must be a way to read"):
            read_shared(model, TOKENS, None, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no evictor"):
        read_shared(bare(), TOKENS, None, kvjax.compression("dms").prefill)
    for mass in ("no", 1, None):
        with pytest.raises(ValueError, match="mass"):
            read_shared(model, TOKENS, None, none.prefill, mass=mass)  # type: ignore


@pytest.mark.parametrize("name", [name for name in READS if name != "prefill"])
def test_weights_that_are_not_finite(name):
    """Slopes and prompts used to be NaN without a word."""
    graph, params = nnx.split(small_model())
    broken = nnx.merge(graph, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params))
    with pytest.raises(ValueError, match="are not finite"):
        READS[name](broken, TOKENS, kvjax.Compression())


def test_arrays_of_meshes_with_explicit_axes():
    """JAX's own default: no product had an annotation for them."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    model = small_model()
    want, _ = kvjax.prefill(model, TOKENS, max_new_tokens=2)
    given = put(TOKENS), put(np.array([8]))
    logits, cache = kvjax.prefill(model, *given, max_new_tokens=2)
    np.testing.assert_allclose(logits, want, atol=1e-5)
    made = generate_from(model, cache, put(np.asarray(logits)), max_new_tokens=1)
    assert int(made.tokens[0, 0]) == int(jnp.argmax(want))


def test_arrays_that_were_deleted():
    model = small_model()
    logits, cache = kvjax.prefill(model, TOKENS, max_new_tokens=2)
    tokens, spent = jnp.asarray(TOKENS), jnp.copy(logits)
    tokens.delete()
    spent.delete()
    with pytest.raises(ValueError, match="`tokens` holds nothing any more"):
        kvjax.prefill(model, tokens)
    with pytest.raises(ValueError, match="`logits` holds nothing any more"):
        generate_from(model, cache, spent, max_new_tokens=1)
    cache.groups[0].tail.keys.delete()
    for call in (
        lambda: kvjax.extend(model, cache, [[1]]),  # type: ignore
        lambda: generate_from(model, cache, logits, max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match="`cache` holds nothing any more"):
            call()
    with pytest.raises(ValueError, match="`prefix` holds nothing any more"):
        kvjax.prefill(model, TOKENS, prefix=cache)


def test_callbacks_see_nothing_under_jit():
    model, heard = small_model(), []

    def run(tokens):
        return kvjax.generate(model, tokens, callback=lambda *x: heard.append(x)).tokens

    with pytest.raises(ValueError, match="`callback` .* under `jit`"):
        jax.jit(run)(TOKENS)
    assert not heard


def test_a_cache_of_another_dtype():
    model, other = small_model(), small_model("bfloat16")
    logits, cache = kvjax.prefill(other, TOKENS, max_new_tokens=2)
    with pytest.raises(ValueError, match="its dtype differs"):
        kvjax.extend(model, cache, [[1]])  # type: ignore
    with pytest.raises(ValueError, match="its dtype differs"):
        generate_from(model, cache, logits, max_new_tokens=2)
    with pytest.raises(ValueError, match="its dtype differs"):
        kvjax.prefill(model, TOKENS, prefix=cache)


@pytest.mark.parametrize("stop", [-1, VOCAB, 2**31, 1.5, "a", True])
def test_stop_tokens_that_no_model_makes(stop):
    with pytest.raises(ValueError, match="stop_tokens"):
        kvjax.generate(small_model(), TOKENS, stop_tokens=[0, stop])


@pytest.mark.parametrize("wrong", [object(), None, "none", kvjax.Compression, 3])
def test_what_cannot_be_described(wrong):
    for value in (wrong, small_model()):
        with pytest.raises(ValueError, match="a KVCache or a Compression") as said:
            describe(value)  # type: ignore
        assert len(str(said.value)) < 700


@pytest.mark.parametrize("path", ["evict.score.type", "evict.score", "evict", "store"])
def test_overrides_that_are_deep(path):
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    for value in (deep, {"type": deep}):
        with pytest.raises(ValueError) as said:
            kvjax.compression("snapkv", **{path: value})
        assert len(str(said.value)) < 1000
