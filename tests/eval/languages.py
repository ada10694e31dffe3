"""Files that tasks in words read, small ones written for tests."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

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


def squad() -> dict[str, Any]:
    """Questions as SQuAD has them: four paragraphs in each of twenty articles."""

    def paragraph(a: int, p: int) -> dict[str, Any]:
        text = (
            f"Town {a}-{p} has {a * 10 + p + 3} streets and lies near {PLACES[a % 5]}."
        )
        ask = {"question": f"How many streets has town {a}-{p}?", "id": f"{a}{p}"}
        spans = [{"text": f"{a * 10 + p + 3} streets", "answer_start": 0}] * 2
        none = {"question": "Who knows?", "answers": [], "is_impossible": True}
        return {
            "context": text,
            "qas": [{**ask, "answers": spans, "is_impossible": False}, none],
        }

    articles = [
        {"title": str(a), "paragraphs": [paragraph(a, p) for p in range(4)]}
        for a in range(20)
    ]
    return {"version": "v2.0", "data": articles}


def hotpotqa() -> list[dict[str, Any]]:
    """Questions as HotpotQA has them, about two of ten pages each."""

    def page(n: int) -> list[Any]:
        return [f"Page {n}", [f"Number {n} is here.", f" It has {n * 7} legs."]]

    return [
        {
            "_id": str(n),
            "question": f"How many legs has number {n * 10}?",
            "answer": f"{n * 70} legs",
            "context": [page(n * 10 + at) for at in range(10)],
            "supporting_facts": [],
        }
        for n in range(1, 9)
    ]


def facts(count: int) -> list[dict[str, str]]:
    """Items as BABILong has them, with facts of `qa1` in other text."""
    people, rooms = ("John", "Mary"), ("kitchen", "garden", "office")
    return [
        {
            "input": f"{essay()[: 100 + 40 * n]} {people[n % 2]} moved to the "
            f"{rooms[n % 3]}.",
            "question": f"Where is {people[n % 2]}? ",
            "target": rooms[n % 3],
        }
        for n in range(count)
    ]


def shots(count: int) -> list[dict[str, str]]:
    """Labelled examples of one kind."""
    return [
        {"text": f"Is {n} even?", "label": "(B)" if n % 2 else "(A)"}
        for n in range(count)
    ]


def shared(count: int, turns: int = 5) -> list[dict[str, Any]]:
    """Records as SCBench has them: keys of an object, asked in turn."""

    def record(n: int) -> dict[str, Any]:
        pairs = {f"key-{n}-{at}": f"value-{n}-{at}" for at in range(20)}
        asked = [
            {"input": f'Key: "{key}"\nThe value is: ', "answer": value}
            for key, value in list(pairs.items())[3 : 3 + turns]
        ]
        text = f"JSON data:\n{json.dumps(pairs)}"
        return {"id": n, "context": text, "multi_turns": asked}

    return [record(n) for n in range(count)]


def write_lines(path: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines, and the path they are at."""
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return str(path)


def fields_of(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Fields of the tasks that need files, which are written into the folder."""
    text = folder / "essay.txt"
    text.write_text(essay(), encoding="utf-8")
    essays = {"essays": str(text)}
    needles = (
        "niah_single_2 niah_single_3 niah_multikey_1 niah_multivalue niah_multiquery"
    )
    files = {"qa_1": ("squad.json", squad()), "qa_2": ("hotpot.json", hotpotqa())}
    for name, content in files.values():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    babi = write_lines(folder / "babi.jsonl", facts(12))
    many = write_lines(folder / "shots.jsonl", shots(900))
    return {
        **dict.fromkeys((f"babilong_qa{n}" for n in (1, 2, 3, 4)), {"path": babi}),
        "babilong_qa5": {
            "path": write_lines(
                folder / "gave.jsonl",
                [
                    {**one, "question": "Who gave the milk?", "target": "Mary"}
                    for one in facts(12)
                ],
            )
        },
        "scbench": {"path": write_lines(folder / "scbench.jsonl", shared(6))},
        "scbench_many_shot": {"path": many},
        **dict.fromkeys(needles.split(), essays),
        **{task: {"path": str(folder / name)} for task, (name, _) in files.items()},
    }
