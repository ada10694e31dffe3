"""Keys without some channels: against the reference, kvpress, and in the cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax.cache import Slots
from kvjax.codecs import ThinK, ThinkArray
from kvjax.models import Decoder
from kvjax.rope import Rope
from tests.compress.samples import Sample, compressed, draw, layer_spec
from tests.reference import think
from tests.small import HEAD_DIM, LATER, LENGTHS, ROWS, batch, small_model
from tests.torch_env import find_torch_python, run_reference

SPEC = layer_spec(6, 2, 32)
ROPE = Rope(head_dim=32)
SNAPKV = {
    "score": {"type": "snapkv", "window": 8},
    "budget": {"type": "uniform", "keep": 0.5},
}
MODEL = small_model(layers=1)


def pruned(keep: float, window: int = 32, **fields) -> kvjax.Compression:
    sizes = {"store.keys.keep": keep, "store.keys.window": window}
    return kvjax.compression("think", **(sizes | fields))


def body(sample: Sample, c: kvjax.Compression) -> tuple[np.ndarray, np.ndarray, Slots]:
    """Keys read back, their positions, and the part that holds them."""
    (part,) = compressed(sample, c).parts
    assert isinstance(part, Slots) and isinstance(part.keys, ThinkArray)
    keys = jax.jit(lambda keys, at: keys.decode(at, ROPE))(part.keys, part.positions)
    return np.asarray(keys), np.asarray(part.positions), part


@pytest.mark.parametrize(("keep", "window"), [(0.6, 32), (0.25, 8), (0.7, 200)])
@pytest.mark.parametrize("evict", [None, SNAPKV], ids=["all", "snapkv"])
def test_channels_are_those_of_the_reference(keep, window, evict):
    """Rows of several lengths, one shorter than the window; what is evicted is out."""
    sample = draw(2, SPEC, (96, 61, 30), width=104)
    fields = {} if evict is None else {"evict": evict}
    keys, positions, part = body(sample, pruned(keep, window, **fields))
    assert isinstance(part.keys, ThinkArray)
    rank = 32 - int(32 * (1 - keep))
    assert part.keys.data.shape == (*positions.shape, rank)
    for row, length in enumerate(sample.lengths):
        q, k, _ = sample.row(row)
        at = positions[row]
        held = np.take_along_axis(k, np.maximum(at, 0)[..., None], axis=1)
        how = {"q_positions": np.arange(length), "window": window}
        scores = think.think_channel_scores(q, held, positions=at, **how)
        kept = think.think_kept_channels(scores, 1 - keep)
        want = think.think_keys(held, kept)
        live = at >= 0
        np.testing.assert_array_equal(keys[row][live], want[live].astype(np.float32))


@pytest.mark.slow
def test_keys_are_those_of_kvpress(tmp_path):
    python, reason = find_torch_python()
    if python is None:
        pytest.skip(reason)
    path = tmp_path / "parts.npz"
    run_reference("reference/kvpress_parts.py", path)
    with np.load(path) as file:
        data = {name: x for name, x in file.items() if name.startswith("think/")}
    outs = [name for name in data if "-" in name]
    assert outs
    for name in outs:
        _, prompt, case, layer, _ = name.split("/")
        ratio, window = case.split("-")
        q, k = (data[f"think/{prompt}/{layer}/{side}"][None] for side in "qk")
        spec = layer_spec(q.shape[1], k.shape[1], k.shape[-1])
        sample = draw(0, spec, (q.shape[2],))
        inputs = dataclasses.replace(sample.inputs, q=jnp.asarray(q), k=jnp.asarray(k))
        sample = dataclasses.replace(sample, inputs=inputs)
        keys, _, _ = body(sample, pruned(round(1 - float(ratio), 6), int(window)))
        np.testing.assert_array_equal(keys[0], data[name])


def encoded(x, live, **fields) -> ThinkArray:
    positions = jnp.zeros(x.shape[:-1], jnp.int32)
    found = ThinK(**fields).encode(x, live, positions, ROPE)
    assert isinstance(found, ThinkArray)
    return found


def test_dead_slots_are_never_read():
    x = np.random.default_rng(0).normal(size=(2, 2, 24, 32)).astype(np.float32)
    live = np.broadcast_to(np.arange(24) % 3 > 0, x.shape[:-1])
    dirty = np.where(live[..., None], x, np.nan)
    clean = encoded(jnp.where(live[..., None], x, 0), jnp.asarray(live))
    found = encoded(jnp.asarray(dirty), jnp.asarray(live))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, clean)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_blocks_are_pieces_of_the_whole():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 24, 32)), jnp.float32)
    whole = encoded(x, jnp.ones(x.shape[:-1], bool))
    positions = jnp.zeros((2, 2, 8), jnp.int32)
    piece = whole.block(8, 8).decode(positions, ROPE)
    back = whole.decode(jnp.zeros(x.shape[:-1], jnp.int32), ROPE)
    np.testing.assert_array_equal(piece, back[:, :, 8:16])


def test_values_keep_the_channels_of_most_energy():
    sample = draw(4, SPEC, (96, 61, 30), width=104)
    values = {"type": "think", "keep": 0.25}
    (part,) = compressed(
        sample, kvjax.compression("none", **{"store.values": values})
    ).parts
    assert isinstance(part, Slots) and isinstance(part.values, ThinkArray)
    for row in range(3):
        square = (sample.row(row)[2] ** 2).sum(axis=1)
        most = np.sort(np.argsort(-square, axis=-1)[:, :8], axis=-1)
        np.testing.assert_array_equal(part.values.channels[row], most)


def test_bytes_are_those_of_the_channels():
    prompt, _, _ = batch()
    _, cache = kvjax.prefill(MODEL, prompt, LENGTHS, pruned(0.25))
    assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    _, plain = kvjax.prefill(MODEL, prompt, LENGTHS)
    slots, rank = cache.layers[0].parts[0].positions.size, HEAD_DIM // 4
    saved = slots * (HEAD_DIM - rank) * 4
    assert plain.nbytes - cache.nbytes == saved - ROWS * 2 * rank * 4
    assert ThinK(keep=0.25).slot_bytes(HEAD_DIM, 4) == rank * 4


def test_all_channels_are_the_thing_itself():
    prompt, later, _ = batch()
    ours, theirs = (
        kvjax.extend(MODEL, kvjax.prefill(MODEL, prompt, LENGTHS, c)[1], later, LATER)[
            0
        ]
        for c in (pruned(1.0), kvjax.Compression())
    )
    for row, n in enumerate(LATER):
        np.testing.assert_allclose(ours[row, :n], theirs[row, :n], atol=1e-5)


def test_two_forms_agree_under_eviction():
    prompt, later, whole = batch()
    c, total = pruned(0.5, 8, evict=SNAPKV), LENGTHS + LATER
    first, cache = kvjax.prefill(MODEL, prompt, LENGTHS, c)
    (part,) = cache.layers[0].parts
    assert isinstance(part, Slots) and isinstance(part.keys, ThinkArray)
    assert part.keys.data.shape == (ROWS, 2, LENGTHS.max() // 2, HEAD_DIM // 2)
    real, _ = kvjax.extend(MODEL, cache, later, LATER)
    logits = kvjax.simulate(MODEL, whole, total, LENGTHS, c)
    for row, n in enumerate(LENGTHS):
        ours = logits[row, n : total[row]]
        np.testing.assert_allclose(logits[row, n - 1], first[row], atol=1e-4)
        np.testing.assert_allclose(ours, real[row, : LATER[row]], atol=1e-4)


def test_the_gradient_goes_through_what_is_held():
    rng = np.random.default_rng(3)
    x, slope = (rng.normal(size=(2, 2, 24, 32)).astype(np.float32) for _ in range(2))
    live = jnp.ones(x.shape[:-1], bool)

    def read(x):
        found = encoded(x, live, keep=0.5)
        return jnp.sum(found.decode(jnp.zeros(x.shape[:-1], jnp.int32), ROPE) * slope)

    found = encoded(jnp.asarray(x), live, keep=0.5)
    held = np.zeros((2, 2, 32), bool)
    np.put_along_axis(held, np.asarray(found.channels), True, axis=-1)
    want = np.where(held[:, :, None], slope, 0)
    np.testing.assert_array_equal(jax.grad(read)(jnp.asarray(x)), want)


@pytest.mark.slow
def test_the_loss_has_a_slope_by_the_keys():
    """As far as the loss goes down along it."""
    graph, params = nnx.split(MODEL)
    _, _, whole = batch()
    total = LENGTHS + 1
    tokens, rows = whole[:, : total.max()], np.arange(ROWS)

    @jax.jit
    def loss(params):
        model: Decoder = nnx.merge(graph, params)
        logits = kvjax.simulate(model, tokens, total, LENGTHS, pruned(0.5))
        return jnp.sum(jax.nn.log_softmax(logits[rows, LENGTHS])[:, 0])

    slope = jax.grad(loss)(params).layers.attention.k.kernel[...]
    size = float(jnp.linalg.norm(slope))
    assert size > 1e-4

    def at(step: float) -> float:
        model = nnx.clone(nnx.merge(graph, params))
        kernel = model.layers.attention.k.kernel
        kernel[...] = kernel[...] + step / size * slope
        return float(loss(nnx.split(model)[1]))

    np.testing.assert_allclose((at(0.01) - at(-0.01)) / 0.02, size, rtol=0.05)


def test_what_does_not_fit():
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keep": 0.0}, "keep = 1 - ratio"),
        ({"keep": 1.5}, "must be a number in \\(0, 1\\]"),
        ({"window": 0}, "window` must be an integer"),
    ]
    for fields, says in wrong:
        with pytest.raises(ValueError, match=says):
            ThinK(**fields)
    with pytest.raises(ValueError, match="takes no later blocks"):
        pruned(0.5, **{"store.residual": 32})
    with pytest.raises(ValueError, match="head-wise budgets"):
        kvjax.compression("adakv_snapkv", **{"store.keys": {"type": "think"}})
    assert pruned(0.5).with_keep(0.25).store.keys == ThinK(keep=0.25)
