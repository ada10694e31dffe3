"""How much of the attention each read finds, beside the best of as many tokens.

A text is read once without compression. In each layer the first `length` tokens become
a cache, once for every read and number of tokens, and the next `queries` tokens ask it,
each as if it were decoded: with the tokens between it and the prompt in the tail.

* `recall`: share of the softmax mass, over all tokens held, of those that are read; the
  mean over query heads, queries and layers. Of the tail, all is read.
* `best`: the same of as many tokens of the prompt, for every query and KV head those
  with the largest weights, summed over the group: what `exact_topk` reads.
* `read`: tokens of the prompt that are read. What a read has beside its budget (sinks,
  local tokens, outliers) is taken out of the budget beforehand.
* `error` and `best_error`: distance of the attention's output from that over all
  tokens, as a share of its length. What is only estimated counts here alone.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, report
from jaxtyping import Array

import kvjax
from kvjax.cache import AbstractPart, AbstractSelecting
from kvjax.codecs import LowRank
from kvjax.compress.config import Compression, Storage
from kvjax.compress.layer import build
from kvjax.compress.observe import observe, wants_mass
from kvjax.compress.survey import survey
from kvjax.models.bundled import model_directory
from kvjax.models.shared_pass import read_shared
from kvjax.pallas_kernels.partial import merge
from kvjax.pallas_kernels.slots import attend_block, slot_logits, slot_mask
from kvjax.prefills import Dense
from kvjax.reads import ExactTopK, InfLLM, Quest, RetroInfer, ShadowKV
from kvjax.turns import take
from kvjax.types import LayerInputs, padded_positions

ROOT = pathlib.Path(__file__).resolve().parent.parent


def methods(tokens: int) -> dict[str, Compression]:
    """Every read, of about `tokens` of the prompt at a step."""
    near = tokens // 4  # what is always read
    odd = tokens // 32  # outlier chunks: 24 of 1024 tokens in the paper
    low = Storage(keys=LowRank(energy=1.0, keep=0.15625))

    def slots(beside: int) -> dict[str, Any]:
        return {"keep": None, "slots": max(1, tokens - beside)}

    infllm = InfLLM(size=16, sinks=4, local=near, **slots(near + 16))
    shadow = ShadowKV(outliers=odd // 4, local=2, **slots(8 * (odd // 4) + 16))
    retro = RetroInfer(local=near - 4, **slots(near))
    return {
        "exact_topk": Compression(read=ExactTopK(**slots(0))),
        "quest": Compression(read=Quest(**slots(0))),
        "infllm": Compression(read=infllm),
        "shadowkv": Compression(read=shadow),
        "shadowkv_low_rank": Compression(read=shadow, store=low),
        "retroinfer": Compression(read=retro),
        "retroinfer_unestimated": Compression(
            read=dataclasses.replace(retro, estimate=0.0)
        ),
    }


@functools.partial(jax.jit, static_argnames=("c", "specs"))
def parts_of(c: Compression, prompt: LayerInputs, specs) -> tuple[AbstractPart, ...]:
    """The cache of a layer after a prompt, without room for more."""
    length = prompt.k.shape[2]
    lengths = jnp.full(prompt.k.shape[:1], length, jnp.int32)
    mass = Dense().attend(prompt, lengths, True)[1] if wants_mass(c) else None
    found = survey(c, specs, lengths, length, prompt.k.dtype)
    seen = observe(prompt, lengths, found.layouts[0].plan, mass)
    share = found.of(prompt.depth)
    return build(seen, lengths, found.layouts[0], share, room=0)[0].parts


@jax.jit
def measured(
    parts: tuple[AbstractPart, ...], asked: LayerInputs, whole: LayerInputs
) -> dict[str, Array]:
    """One layer's numbers; `whole` are the prompt and the tokens behind it."""
    spec, length = whole.spec, whole.k.shape[2] - asked.q.shape[2]
    b, h, t, _ = asked.q.shape
    kv_heads = whole.k.shape[1]
    how: dict[str, Any] = {"scale": spec.scale, "softcap": spec.softcap}
    at = jnp.broadcast_to(whole.positions[:, None], whole.k.shape[:3])
    seen = slot_mask(asked.positions, at, spec.window)
    logits = slot_logits(asked.q, whole.k, **how)
    weight = jax.nn.softmax(jnp.where(seen[:, :, None], logits, -jnp.inf), axis=-1)
    behind = jnp.arange(at.shape[-1]) >= length
    mask, others = seen & behind, []
    for part in parts:
        if isinstance(part, AbstractSelecting):
            chosen = part.chosen(asked.q, asked.positions, spec)
        else:
            chosen = slot_mask(asked.positions, part.positions, spec.window)
        # Slots to tokens; free ones are dropped.
        place = jnp.where(part.positions >= 0, part.positions, at.shape[-1])
        lead = jnp.indices((b, kv_heads, t, 1), sparse=True)[:3]
        mask = mask.at[(*lead, place[:, :, None])].max(chosen, mode="drop")
        others.append(part.attend(asked.q, asked.positions, spec))
    own = attend_block(asked.q, whole.k, whole.v, seen & behind, **how)
    out = merge([*others, own]).out
    full = attend_block(asked.q, whole.k, whole.v, seen, **how).out
    # As many tokens of the prompt, the best ones.
    count = jnp.sum(mask[..., :length], axis=-1)
    summed = jnp.sum(weight, axis=2)[..., :length]
    rank = jnp.argsort(jnp.argsort(-summed, axis=-1), axis=-1)
    best = (rank < count[..., None]) & seen[..., :length]
    best = jnp.concatenate([best, (seen & behind)[..., length:]], axis=-1)
    ideal = attend_block(asked.q, whole.k, whole.v, best, **how).out

    def found(mask: Array) -> Array:
        return jnp.mean(jnp.sum(jnp.where(mask[:, :, None], weight, 0), axis=-1))

    def away(out: Array) -> Array:
        norm = jnp.linalg.norm(full, axis=-1)
        return jnp.mean(jnp.linalg.norm(out - full, axis=-1) / norm)

    return {
        "read": jnp.mean(count.astype(jnp.float32)),
        "recall": found(mask),
        "best": found(best),
        "error": away(out),
        "best_error": away(ideal),
    }


def main() -> int:
    args = arguments(
        __doc__,
        model="kvjax-tiny",
        text=str(ROOT / "LICENSE"),
        length=512,
        queries=16,
        tokens=[64, 128],
        layers=6,
        start=0,
    )
    model, tokenizer = kvjax.load(model_directory(args.model))
    text = pathlib.Path(args.text).read_text(encoding="utf-8")[args.start :]
    ids = tokenizer.encode(text[: 8 * (args.length + args.queries)])
    total = args.length + args.queries
    if len(ids) < total:
        raise SystemExit(f"the text has {len(ids)} tokens; expected {total}")
    tokens = np.asarray(ids[:total], np.int32)[None]
    seen = read_shared(model, tokens, None, Dense())
    specs = model.config.layers
    places = [(group, turn) for group in seen.inputs for turn in range(len(group.k))]
    at = np.unique(np.linspace(0, len(places) - 1, args.layers).round().astype(int))
    results: dict[str, dict[str, dict[str, float]]] = {}
    for count in args.tokens:
        for name, c in methods(count).items():
            rows = []
            for layer in at:
                group, turn = places[layer]
                inputs = take(group, turn)
                lengths = jnp.full((1,), total, jnp.int32)
                positions = padded_positions(lengths, inputs.k.shape[2])
                inputs = dataclasses.replace(inputs, positions=positions)
                prompt, asked, whole = (
                    inputs.taken(index[None], jnp.ones((1, len(index)), bool))
                    for index in (
                        jnp.arange(args.length),
                        jnp.arange(args.length, total),
                        jnp.arange(total),
                    )
                )
                parts = parts_of(c, prompt, (inputs.spec,) * len(specs))
                rows.append(measured(parts, asked, whole))
            row = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
            results.setdefault(str(count), {})[name] = {
                key: round(x, 4 if key != "read" else 1) for key, x in row.items()
            }
            print(count, name, results[str(count)][name], file=sys.stderr)
    config = vars(args) | {"text": pathlib.Path(args.text).name}
    name = pathlib.Path(args.model).name.replace("-", "_")
    return report(f"read_recall_{name}", config, results)


if __name__ == "__main__":
    sys.exit(main())
