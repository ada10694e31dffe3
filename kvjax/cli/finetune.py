"""`kvjax finetune`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, final

import tyro
from rich.console import Console

from kvjax.cli.base import UI, Assignments, Command, Folder, Output, compile_cache


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(Command):
    """Train a model under the compressions that it shall tolerate."""

    summary: ClassVar[str] = "Train a model, plain or under simulated compression."
    presets: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax finetune --config tolerant\n"
        "  kvjax finetune --config mine.yaml --set optimizer.learning_rate=0.0005\n"
        "\n"
        "Checkpoints and log.jsonl go to OUT, the finished model to OUT/model. A run\n"
        "that was interrupted goes on when the same command is given again."
    )

    config: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")]
    """A bundled recipe (tolerant, dms, text, kvjax_tiny) or a YAML file."""
    set: Assignments = ()
    """A field of the recipe, as in --set seed=1; repeatable."""
    out: Folder = None
    """Directory of the run; default: runs/NAME-SEED."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        from kvjax.train.config import load_config
        from kvjax.train.run import run

        del ui  # the loop writes a line per step
        config = load_config(self.config, self.set)
        compile_cache()
        name = f"{pathlib.Path(self.config).stem}-{config.seed}"
        out = self.out or pathlib.Path("runs") / name
        state = run(config, out)
        return {"out": str(out), "model": str(out / "model"), "steps": int(state.step)}

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        del console
        print(f"{result['steps']} steps; the model is in {result['model']}")
