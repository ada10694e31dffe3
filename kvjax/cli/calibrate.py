"""`kvjax calibrate`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, final

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from kvjax.cli.base import (
    MOST,
    UI,
    Command,
    Dtype,
    File,
    Fraction,
    Items,
    Model,
    Output,
    Text,
    load_model,
)
from kvjax.cli.tables import print_table
from kvjax.compress.presets import COMPONENTS
from kvjax.config import decode, encode
from kvjax.fields import Range
from kvjax.files import parse_yaml, read_text
from kvjax.models.bundled import DEFAULT
from kvjax.models.tokenizer import encoded
from kvjax.prefills import AbstractPrefill

MOST_BYTES = 64 * 2**20
"""Of a prompt's file."""

Candidates = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="YAML")
]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Find the sparse pattern of prefill that suits each head of a model."""

    summary: ClassVar[str] = "Find each head's sparse prefill pattern; write a YAML."
    resumes: ClassVar[bool] = False
    presets: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax calibrate table.yaml --model DIR --length 30000\n"
        "  kvjax calibrate table.yaml --prompt-file book.txt --retain 0.95 \\\n"
        "      --candidate '{type: a_shape, first: 128, local: 896}' \\\n"
        "      --candidate '{type: xattention, threshold: 0.9}' --candidate dense\n"
    )

    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")]
    """File to write: a compression that reads prompts by the table."""
    model: Model = DEFAULT
    prompt_file: File = None
    """File with a prompt to measure on; left out: items of --task."""
    task: Text = None
    """Task whose items, with their answers, are measured on; left out: recall."""
    length: Annotated[int, Range(2, MOST)] = 4096
    """Tokens of an item, or of the prompt's beginning. As long as can be: patterns that
    differ over long prompts are alike over short ones."""
    items: Items = None
    """Items to measure on; left out: one."""
    candidate: Candidates = ()
    """A pattern, as a compression's `prefill` has it; give it again for more. Left out:
    MInference's."""
    retain: Fraction = None
    """Take what computes least of those that keep this share of a head's attention;
    left out: what keeps most."""
    dtype: Dtype = "auto"
    """Of the parameters; auto: float32 if bundled or fetched, else bfloat16."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        from kvjax.models.calibration import CANDIDATES, calibrate, check_target
        from kvjax.models.padding import pad_rows

        check_target(self.out)
        if self.prompt_file is not None and (self.task, self.items) != (None, None):
            raise ValueError(
                "--prompt-file is measured on by itself; leave --task and --items out."
            )
        patterns = tuple(map(_pattern, self.candidate)) or CANDIDATES
        model, tokenizer = load_model(self.model, self.dtype, ui)
        rows = self._rows(tokenizer)
        with ui.status("measuring"):
            found = calibrate(
                model,
                *pad_rows(rows),
                candidates=patterns,
                retain=self.retain,
                name=self.model,
            )
        found.save(self.out)
        kept, cost = found.chosen(found.retained), found.chosen(found.share)
        return {
            "out": str(self.out),
            "model": found.model,
            "tokens": [len(row) for row in rows],
            "patterns": [
                {
                    "pattern": encode(one, COMPONENTS),
                    "heads": int((found.table == place).sum()),
                    "retained": float(found.retained[..., place].mean()),
                    "share": float(found.share[..., place].mean()),
                }
                for place, one in enumerate(found.patterns)
            ],
            "retained": float(kept.mean()),
            "share": float(cost.mean()),
        }

    def _rows(self, tokenizer: Any) -> list[list[int]]:
        """Prompts as tokens."""
        if self.prompt_file is not None:
            text = read_text(self.prompt_file, MOST_BYTES)
            ids = encoded(tokenizer, text)[: self.length]
            if not ids:
                raise ValueError(f"{self.prompt_file} holds no text to measure on.")
            return [ids]
        from kvjax.eval.tasks import make_task
        from kvjax.eval.tasks.base import Episode

        def whole(episode: Episode) -> str:
            turn = episode.turns[0]
            return episode.context + turn.question + turn.prefix + turn.answer

        def measure(episode: Episode) -> int:
            return len(encoded(tokenizer, whole(episode)))

        task = make_task(self.task or "recall")
        made = task.episodes(0, self.items or 1, self.length, measure)
        return [encoded(tokenizer, whole(one)) for one in made]

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        table = Table(title=result["model"], box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("pattern")
        for name in ("heads", "mass kept", "computed"):
            table.add_column(name, justify="right")
        for row in result["patterns"]:
            fields = dict(row["pattern"])
            text = f"{fields.pop('type')} " + ", ".join(
                f"{name}={value}" for name, value in fields.items()
            )
            kept, cost = f"{row['retained']:.4f}", f"{row['share']:.4f}"
            table.add_row(text.strip(), str(row["heads"]), kept, cost)
        kept, cost = f"{result['retained']:.4f}", f"{result['share']:.4f}"
        table.add_row("as chosen", "", kept, cost)
        print_table(console, table)
        print(f"written to {result['out']}")


def _pattern(text: str) -> AbstractPrefill:
    """A candidate from its YAML."""
    tree = parse_yaml(text, "--candidate")
    return decode(tree, AbstractPrefill, COMPONENTS, "candidate")
