"""`kvjax report`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, final

import tyro
from rich.console import Console

from kvjax.cli.base import UI, Command, Folder, Output, optional


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Figures and one self-contained page from a run directory."""

    summary: ClassVar[str] = "Turn a run directory into figures and one HTML page."
    resumes: ClassVar[bool] = False
    presets: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax report results/demo\n"
        "  kvjax report results/demo --out report      somewhere else\n"
        "  kvjax report results/demo --compare snapkv,h2o\n"
    )

    run_dir: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="RUN")]
    """Directory that `kvjax eval` or `kvjax demo` wrote, finished or not."""
    out: Folder = None
    """Folder for report.html and the PNG files; RUN/report if left out."""
    compare: Annotated[str | None, optional("A,B")] = None
    """Two compressions whose kept tokens stand side by side; else the first two."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        from kvjax.eval.report import write_report

        compare = None
        if self.compare is not None:
            compare = [name.strip() for name in self.compare.split(",")]
        with ui.status("drawing"):
            page = write_report(self.run_dir, self.out, compare=compare)
        figures = sorted(str(file) for file in page.parent.glob("*.png"))
        return {"report": str(page), "figures": figures}

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        print(f"{result['report']}  ({len(result['figures'])} PNG files beside it)")
