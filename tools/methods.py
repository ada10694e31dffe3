"""Write docs/methods.md from the presets: `python tools/methods.py`.

What a preset says at the head of its file is its documentation; this page collects it,
with the YAML and with what the components say. A test keeps the page current.
"""

import dataclasses
import pathlib
import re

from kvjax.compress.presets import compression, compressions, describe

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "methods.md"
FOLDER = PAGE.parent.parent / "configs" / "compression"

HEAD = """# Methods

Every preset of `configs/compression/`, as its file describes it. Written by
`python tools/methods.py`; do not edit.

    c = kvjax.compression("snapkv", **{"evict.budget.keep": 0.25})

`keep` is the kept fraction, everywhere. Where two libraries use one name for two
algorithms, the preset says which one it follows.

"""


def components(value: object) -> list[str]:
    """Import names of the components that differ from the defaults."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return []
    names = []
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if held != field.default and dataclasses.is_dataclass(held):
            cls = type(held)
            package = ".".join(cls.__module__.split(".")[:2])
            if package != "kvjax.compress":
                names.append(f"`{package}.{cls.__name__}`")
            names += components(held)
    return names


def section(name: str) -> str:
    """One preset: what it is, where it comes from, its YAML."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    body = "\n".join(line for line in lines if not line.startswith("#"))
    used = ", ".join(dict.fromkeys(components(compression(name))))
    text = f"## {name}\n\n{describe(name)}\n"
    if used:
        text += f"\nComponents: {used}.\n"
    return f"{text}\n```yaml\n{body.strip()}\n```\n"


def page() -> str:
    """The whole page."""
    names = compressions()
    rows = [f"| [`{n}`](#{n}) | {describe(n).splitlines()[0]} |" for n in names]
    table = "\n".join(["| preset | |", "|---|---|", *rows])
    sections = "\n".join(section(name) for name in names)
    return re.sub(r"\n{3,}", "\n\n", f"{HEAD}{table}\n\n{sections}")


if __name__ == "__main__":
    PAGE.write_text(page())
