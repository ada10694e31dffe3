"""`kvjax bench`."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, final

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from kvjax.cli.base import (
    MOST,
    UI,
    Assignments,
    Command,
    Dtype,
    Fraction,
    Model,
    Output,
    load_model,
    pick,
    split,
)
from kvjax.cli.tables import held_label, print_table
from kvjax.fields import Range
from kvjax.models.bundled import DEFAULT

MOST_TOKENS = 2**28
"""Of all prompts together."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Time prefill and decoding of a model on this machine."""

    summary: ClassVar[str] = "Time a model on this machine with several compressions."
    resumes: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax bench\n"
        "  kvjax bench --model DIR --compression none,snapkv,kivi_4bit --length 8192\n"
    )

    model: Model = DEFAULT
    compression: Annotated[str, tyro.conf.arg(metavar="A,B,C")] = (
        "none,snapkv,h2o,int8,kivi_4bit,snapkv_kivi"
    )
    """Compressions from the list above or YAML files, with commas between."""
    keep: Fraction = None
    """Fraction kept by those that have a budget; the preset's own if left out."""
    set: Assignments = ()
    """Set a field of every compression, as in --set evict.score.window=16."""
    length: Annotated[int, Range(1, MOST)] = 1024
    """Prompt tokens (drawn at random)."""
    batch: Annotated[int, Range(1, 2**16)] = 1
    """Prompts at a time."""
    new_tokens: Annotated[int, Range(2, MOST)] = 32
    """Tokens to decode per measurement."""
    repeats: Annotated[int, Range(1, 10**6)] = 3
    """Measurements; their median counts. Compilation is left out."""
    dtype: Dtype = "auto"
    """Of the parameters; auto: float32 if bundled or fetched, else bfloat16."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        import jax

        chosen = {name: self._pick(name) for name in split(self.compression)}
        if not chosen:
            raise ValueError(
                "--compression names none. Give some of the list in --help."
            )
        model, _ = load_model(self.model, self.dtype, ui)
        self._check_room(model.config.max_positions)
        rows = []
        with Progress(console=ui.err, disable=not ui.bars, transient=True) as bar:
            task = bar.add_task("", total=len(chosen))
            for name, c in chosen.items():
                bar.update(task, description=escape(name))
                rows.append({"compression": name, **self._measure(model, c)})
                bar.advance(task)
        shape = {"length": self.length, "batch": self.batch}
        device = jax.devices()[0].device_kind
        about = {"model": self.model, "device": device, "dtype": model.dtype.name}
        return {**about, **shape, "rows": rows}

    def _pick(self, name: str):
        c = pick(name, None, self.set)
        return c if self.keep is None or not c.has_budget else c.with_keep(self.keep)

    def _check_room(self, most: int) -> None:
        """Before memory is taken for prompts of that size."""
        if self.length + self.new_tokens > most:
            raise ValueError(
                f"--length {self.length} and --new-tokens {self.new_tokens} are "
                f"{self.length + self.new_tokens} tokens; the model's range is {most}."
            )
        if self.batch * self.length > MOST_TOKENS:
            raise ValueError(
                f"--batch {self.batch} times --length {self.length} are more than "
                f"{MOST_TOKENS} tokens. Lower one of them."
            )

    def _measure(self, model, c) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp

        from kvjax.models.generation import generate_from
        from kvjax.models.inference import prefill

        draw = np.random.default_rng(0)
        shape = (self.batch, self.length)
        drawn = draw.integers(0, model.config.vocab_size, shape, dtype=np.int32)
        tokens = jnp.asarray(drawn)

        def read():
            return prefill(model, tokens, None, c, max_new_tokens=self.new_tokens)

        logits, cache = jax.block_until_ready(read())

        def decode():
            new = self.new_tokens
            return generate_from(model, cache, logits, max_new_tokens=new)

        read_ms, first = 1e3 * self._median(read), decode()
        jax.block_until_ready(first)
        # The first of the new tokens comes from the prompt's own logits.
        step_ms = 1e3 * self._median(decode) / (self.new_tokens - 1)
        return {
            "keep": c.keep,
            "prefill_ms": round(read_ms, 3),
            "ms_per_token": round(step_ms, 4),
            "resident_bytes": cache.nbytes // self.batch,
            "host_bytes": cache.host_nbytes // self.batch,
        }

    def _median(self, call: Callable[[], Any]) -> float:
        import jax

        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        title = (
            f"{result['model']} ({result['dtype']}) on {result['device']}: "
            f"{result['length']} tokens, batch {result['batch']}"
        )
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("compression")
        for name in ("keep", "prefill ms", "ms/token", "KiB/sequence"):
            table.add_column(name, justify="right")
        for row in result["rows"]:
            table.add_row(
                row["compression"],
                "" if row["keep"] is None else f"{row['keep']:g}",
                f"{row['prefill_ms']:.1f}",
                f"{row['ms_per_token']:.2f}",
                held_label(row),
            )
        print_table(console, table)
