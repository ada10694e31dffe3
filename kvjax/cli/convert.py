"""`kvjax convert`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, final

import tyro
from rich.console import Console

from kvjax.cli.base import UI, Command, Flag, Output, load_model


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Load a checkpoint and save it again, perhaps in another precision."""

    summary: ClassVar[str] = "Save a checkpoint in Hugging Face layout, in any dtype."
    resumes: ClassVar[bool] = False
    presets: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax convert path/to/model path/to/copy --dtype bfloat16\n"
        "  kvjax convert owner/name path/to/copy       from the Hugging Face hub\n"
        "  kvjax convert model.gguf path/to/copy --dtype float32\n"
    )

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Checkpoint directory (config.json, *.safetensors, tokenizer), GGUF file or hub
    id."""
    out: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="OUT")]
    """Directory to write."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the parameters."""
    overwrite: Flag = False
    """Write into a directory that already holds files."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        from kvjax.models.io import save
        from kvjax.models.saving import check_target

        check_target(self.out)
        if self.out.is_dir() and any(self.out.iterdir()) and not self.overwrite:
            raise ValueError(
                f"{self.out} is not empty. Give another directory, or --overwrite."
            )
        model, tokenizer = load_model(self.source, self.dtype, ui)
        with ui.status(f"saving to {self.out}"):
            save(model, self.out, tokenizer)
        files = {f.name: f.stat().st_size for f in sorted(self.out.iterdir())}
        return {"out": str(self.out), "dtype": self.dtype, "files": files}

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        total = sum(result["files"].values()) / 2**20
        print(f"{result['out']}  ({result['dtype']}, {total:.1f} MiB)")
