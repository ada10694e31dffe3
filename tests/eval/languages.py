"""Files that tasks in words read, small ones written for tests."""

import pathlib

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")
PLACES = ("a barn", "the sea", "a mill", "the old road", "a lake")


def essay() -> str:
    """Sentences none of which is like another, in paragraphs."""
    lines = [
        f"{NAMES[i % 6]} walked {i + 2} miles to {PLACES[i % 5]} and "
        f"{'slept' if i % 3 else 'sang'} there."
        for i in range(120)
    ]
    return "\n\n".join("\n".join(lines[i : i + 7]) for i in range(0, 120, 7))


def fields_of(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Fields of the tasks that need files, which are written into the folder."""
    text = folder / "essay.txt"
    text.write_text(essay(), encoding="utf-8")
    essays = {"essays": str(text)}
    needles = (
        "niah_single_2 niah_single_3 niah_multikey_1 niah_multivalue niah_multiquery"
    )
    return dict.fromkeys(needles.split(), essays)
