"""`kvjax plan`."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, final

import tyro
from rich.console import Console

from kvjax.cli.base import (
    MODELS,
    MOST,
    UI,
    Assignments,
    Command,
    Count,
    File,
    Flag,
    Fraction,
    Mesh,
    Output,
    Text,
    mesh_of,
    optional,
    pick,
    split,
)
from kvjax.cli.tables import print_table
from kvjax.fields import Range
from kvjax.messages import shown
from kvjax.models.bundled import DEFAULT, shapes
from kvjax.pallas_kernels.targets import TARGETS
from kvjax.places import check_place

NONE_FITS = 1
"""Exit code where nothing that was asked for fits."""

_MODEL = f"{MODELS} Its config is enough; without one: {', '.join(shapes())}."
_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand(Command):
    """Say what fits, before anything is loaded."""

    summary: ClassVar[str] = "Say whether a model, a context and a batch fit a chip."
    resumes: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax plan --model meta-llama/Llama-3.1-8B --device v6e\n"
        "  kvjax plan --model DIR --device v5e,v6e,h200 --context 32768 --fit\n"
        "  kvjax plan --model DIR --compression none,snapkv --plot plan.png\n"
    )

    model: Annotated[str, tyro.conf.arg(metavar="DIR|ID", help=_MODEL)] = DEFAULT
    compression: Text = None
    """Compressions from the list below or YAML files, with commas between."""
    keep: Fraction = None
    """Fraction kept by those that have a budget; the preset's own if left out."""
    set: Assignments = ()
    """Set a field of every compression, as in --set evict.score.window=16."""
    context: Count = None
    """Tokens of a row, prompt and answer; the model's range if left out."""
    batch: Annotated[int, Range(1, 2**16)] = 1
    """Rows."""
    new_tokens: Annotated[int, Range(1, MOST)] = 64
    """Of the context, tokens that are generated."""
    device: Annotated[
        str,
        tyro.conf.arg(
            metavar="A,B,C",
            help=f"Chips: {', '.join(TARGETS)}. Or here, for this machine's device.",
        ),
    ] = "here"
    memory: Annotated[str | None, optional("SIZE")] = None
    """Of each chip, if not all of it may be used, as in 12GB or 12GiB."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the weights, and of keys and values that are not encoded."""
    chips: Annotated[int, Range(1, 4096)] = 1
    """Chips over which weights, heads and rows are split."""
    mesh: Mesh = None
    """How many ways, by axis: data (rows) and model (heads), as in data=2,model=4."""
    fit: Flag = False
    """Search the mildest budget that fits, or the most bits."""
    compile: Flag = False
    """Ask the compiler of the chip, which runs nothing; minutes."""
    plot: File = None
    """Draw bytes against context into a PNG or SVG file."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        from kvjax.planning import plan

        target = self._target()
        with ui.status("planning") as told:
            found = plan(
                self.model,
                self._asked(),
                context=self.context,
                batch=self.batch,
                device=list(split(self.device)),
                new_tokens=self.new_tokens,
                dtype=self.dtype,
                memory=None if self.memory is None else bytes_of(self.memory),
                chips=self.chips,
                mesh=None if self.mesh is None else mesh_of(self.mesh),
                fit=self.fit,
                compile=self.compile,
                told=told,
            )
            if target is not None:
                from kvjax.eval.report.style import png, save_svg

                target.parent.mkdir(parents=True, exist_ok=True)
                if target.suffix == ".svg":
                    save_svg(found.plot(), target)
                else:
                    target.write_bytes(png(found.plot()))
        return found.as_tree()

    def _asked(self) -> dict[str, Any] | None:
        from kvjax.planning import asked

        names = asked.DEFAULT if self.compression is None else split(self.compression)
        if not names:
            raise ValueError(
                "--compression names none. Give some of the list in --help."
            )
        found = {name: pick(name, None, self.set) for name in names}
        if self.keep is None:
            return found
        keep = self.keep
        return {n: c.with_keep(keep) if c.has_budget else c for n, c in found.items()}

    def _target(self) -> pathlib.Path | None:
        """Where the figure goes, which can be written."""
        if self.plot is None:
            return None
        if self.plot.suffix not in (".png", ".svg"):
            raise ValueError(
                f"--plot {shown(str(self.plot))}: expected a name that ends on .png or "
                ".svg."
            )
        check_place(self.plot.parent, "Give --plot another file.")
        return self.plot

    def code(self, result: Mapping[str, Any]) -> int:
        """0 where one of the compressions fits one of the chips, else 1."""
        return 0 if result["fits"] else NONE_FITS

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        from kvjax.planning import Plan
        from kvjax.planning.table import remarks, tables

        found = Plan.of_tree(result)
        console.print(found.headline, soft_wrap=True, highlight=False)
        for table in tables(found):
            console.print()
            print_table(console, table)
        console.print()
        for line in remarks(found):
            console.print(line, soft_wrap=True, highlight=False)


def bytes_of(text: str) -> int:
    """`12GB` as a number of bytes.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", text)
    if found is None or found[2] not in _UNITS or len(found[1]) > 20:
        raise ValueError(
            f"--memory {shown(text)}: expected a size in {[*_UNITS][1:]}, as in 12GB."
        )
    return int(float(found[1]) * _UNITS[found[2]])
