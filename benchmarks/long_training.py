"""Training on long rows in chunks: memory at several lengths, and one real gradient.

Temporaries of one loss and gradient, by the compiler, for rows of several lengths: read
at once, in chunks with a full cache, and in chunks whose cache is compressed behind
each. Nothing of that is run.

With `--model DIR` instead one row of `--text` goes through a real model at once and in
chunks with a full cache, whose gradients should be the same.
"""

import functools
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import arguments, large, report
from flax import nnx

import kvjax
from kvjax.compress.config import Compression
from kvjax.models import Decoder, DecoderConfig
from kvjax.train.data.batch import TokenBatch
from kvjax.train.objectives.objective import make_objective
from kvjax.train.recipe import ChunksConfig, DataConfig, Source, Stage, TrainConfig
from kvjax.train.run.params import Params, params_of, with_params

SHAPE = jax.ShapeDtypeStruct


def recipe(shape: DecoderConfig, chunks: ChunksConfig | None) -> TrainConfig:
    """A recipe of which only the loss counts."""
    return TrainConfig(
        model=shape,
        data=DataConfig(sources=(Source(task="recall"),)),
        stages=(Stage(steps=1, lengths={64: 1}),),
        chunks=chunks,
        remat=True,
        loop_layers=True,
    )


def gradient(
    model: Decoder, chunks: ChunksConfig | None, c: Compression | None = None
) -> Any:
    """`(params, batch) -> ((loss, metrics), gradient)`, jitted."""
    objective = make_objective(recipe(model.config, chunks), c)

    def loss(params: Params, batch: TokenBatch):
        return objective(with_params(model, params), batch, None)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def batch_of(tokens: Any, length: int, make: Any = jnp.ones) -> TokenBatch:
    """One row, of which every token counts."""
    return TokenBatch(
        tokens=tokens,
        weights=make((1, length), jnp.float32),
        answers=make((1, length), jnp.bool_),
        prompt_lengths=make((1,), jnp.int32),
        step=make((), jnp.int32),
        later=length,
    )


def temporaries(
    shape: DecoderConfig, chunks: ChunksConfig | None, c: Any, length: int
) -> int:
    """Bytes beside arguments and results."""
    model = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0)))
    params = jax.eval_shape(lambda: params_of(Decoder(shape, rngs=nnx.Rngs(0))))
    batch = batch_of(SHAPE((1, length), jnp.int32), length, SHAPE)
    program = gradient(model, chunks, c).lower(params, batch).compile()
    memory = program.memory_analysis()
    assert memory is not None  # every backend we compile for has it
    return memory.temp_size_in_bytes


def memory(args: Any) -> dict[str, dict[str, int]]:
    """By way of reading and length."""
    shape = large(args.layers, vocab=8192)
    slots = kvjax.compression(args.compression, **{"evict.budget.slots": args.slots})
    ways: dict[str, tuple[ChunksConfig | None, Compression | None]] = {
        "at once": (None, None),
        "chunks, full cache": (ChunksConfig(size=args.chunk), None),
        "chunks, bounded": (ChunksConfig(size=args.chunk), slots),
        "chunks, bounded, no segments": (
            ChunksConfig(size=args.chunk, segments=False),
            slots,
        ),
    }
    return {
        name: {
            str(length): temporaries(shape, chunks, c, length)
            for length in args.lengths
        }
        for name, (chunks, c) in ways.items()
    }


def timed(run: Any, *given: Any) -> tuple[float, Any]:
    """Seconds of one call, compiling aside, and what it gave."""
    program = run.lower(*given).compile()
    start = time.perf_counter()
    found = jax.block_until_ready(program(*given))
    return time.perf_counter() - start, found


def compared(args: Any) -> dict[str, Any]:
    """One gradient of a real model, at once and in chunks."""
    model, tokenizer = kvjax.load(args.model, "float32")
    text = pathlib.Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer(text[: 8 * args.length])["input_ids"][: args.length]
    tokens = jnp.asarray(np.asarray(ids, np.int32)[None])
    batch, params = batch_of(tokens, len(ids)), params_of(model)
    seconds, (at_once, wanted) = timed(gradient(model, None), params, batch)
    wanted = jax.tree.map(np.asarray, wanted)
    chunks = ChunksConfig(size=args.part)
    more, (chunked, found) = timed(gradient(model, chunks), params, batch)

    def apart(name: str) -> float:
        most = np.abs(wanted[name]).max()
        return float(np.abs(np.asarray(found[name]) - wanted[name]).max() / most)

    by_weight = {name: apart(name) for name in wanted}
    total = functools.reduce(
        np.add, [np.square(np.asarray(found[n]) - wanted[n]).sum() for n in wanted]
    )
    norm = functools.reduce(np.add, [np.square(x).sum() for x in wanted.values()])
    return {
        "tokens": len(ids),
        "losses": {"at once": float(at_once[0]), "in chunks": float(chunked[0])},
        "largest_relative_difference": max(by_weight.values()),
        "by_weight": by_weight,
        "relative_difference_of_norms": float(np.sqrt(total / norm)),
        "seconds": {"at once": round(seconds, 1), "in chunks": round(more, 1)},
    }


def main() -> int:
    args = arguments(
        __doc__,
        lengths=[8192, 32768, 131072],
        layers=2,
        chunk=1024,
        slots=2048,
        compression="snapkv",
        model="",
        text="",
        length=4096,
        part=512,
    )
    if not args.model:
        return report("long_training", vars(args), {"temp_bytes": memory(args)})
    # Where files lie says nothing about what was measured.
    names = {key: pathlib.Path(vars(args)[key]).name for key in ("model", "text")}
    return report("long_gradient", vars(args) | names, compared(args))


if __name__ == "__main__":
    sys.exit(main())
