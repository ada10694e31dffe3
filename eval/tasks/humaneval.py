"""HumanEval: functions that are completed, and run against their tests."""

import dataclasses
import keyword
import re
import sys
from collections.abc import Sequence
from typing import ClassVar, final

from kvjax.eval.running_code import Outcome, cannot_run, run_code
from kvjax.eval.tasks.base import Turn
from kvjax.eval.tasks.from_files import Draft
from kvjax.eval.tasks.reading_files import Record
from kvjax.eval.tasks.shots import FewShot, Problem
from kvjax.fields import Positive

_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_BEHIND = re.compile(r"^(?:class |def |#|@|if |print\(|assert |```)", re.MULTILINE)
"""A line that begins so, at the margin, is no part of the function any more."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class HumanEval(FewShot):
    """Functions of HumanEval: a reply is right if its function passes the tests.

    The worked examples are other problems of the file, since there is no split for
    them: the first `shots`, without the problem itself.

    To score a reply, its code is run on this machine, in a process of its own with
    limits (see `kvjax.eval.running_code`): a guard against accidents, no jail.

    Source: Chen et al. 2021, asked as in KVFundaBench with 8 examples; greedy, so
    pass@1 is the share of problems. Deviation: a reply ends at the first line at the
    margin that does not belong to the function; code in a fence is taken out of it.

    Attributes:
        allow_code: whether code that the model writes may be run.
        seconds: that the tests of one reply may take.
    """

    name: ClassVar[str] = "humaneval"
    columns: ClassVar[tuple[str, ...]] = (
        "task_id",
        "prompt",
        "canonical_solution",
        "test",
        "entry_point",
    )
    given: ClassVar[tuple[str, ...]] = ("humaneval", "HumanEval.jsonl.gz")
    shots_split: ClassVar[str] = "test"
    among: ClassVar[bool] = True

    new_tokens: Positive = 512
    allow_code: bool = False
    seconds: Positive = 5

    def problem(self, row: Record) -> Problem:
        name = row.text("entry_point").strip()
        if not name.isidentifier() or keyword.iskeyword(name):
            raise row.wrong("entry_point", "the name of a function")
        prompt = row.text("prompt")
        return Problem(
            place=row.place,
            question=prompt if prompt.endswith("\n") else prompt + "\n",
            prefix="",
            answer=row.text("canonical_solution"),
            meta={
                "problem": row.text("task_id"),
                "function": name,
                "test": row.text("test"),
            },
        )

    def drafts(self, turns: int) -> Sequence[Draft]:
        self._check_allowed()
        found = super().drafts(turns)
        if why := cannot_run():
            raise ValueError(
                "Task 'humaneval' cannot run programs here: one that does nothing "
                f"ended with {why!r}. It needs an interpreter ({sys.executable}), "
                "a temporary folder, and processes of its own."
            )
        return found

    def score(self, item: Turn, reply: str) -> float:
        """1 if the function passes its tests; runs it."""
        return float(self.outcome(item, reply).passed)

    def outcome(self, item: Turn, reply: str) -> Outcome:
        """Whether the function passes its tests, and what went wrong; runs it.

        Raises:
            ValueError: code may not be run.
        """
        self._check_allowed()
        return run_code(program(item, reply), seconds=float(self.seconds))

    def lacks(self) -> str:
        """The file, or leave to run code."""
        if self.allow_code:
            return super().lacks()
        return (
            "it runs code that the model writes, with the rights of this user: it can "
            "read what you can read, and what keeps it from writing and from the "
            "network guards against accidents only. Allow that with `allow_code: true` "
            "(--allow-code), best in a container."
        )

    def _check_allowed(self) -> None:
        if not self.allow_code:
            raise ValueError(f"Task 'humaneval': {self.lacks()}")


def program(item: Turn, reply: str) -> str:
    """The function that a reply writes or completes, with its tests behind it."""
    name, prompt = item.meta["function"], item.question
    fenced = _FENCE.search(reply)
    code = fenced[1] if fenced else reply
    defined = _definition(name, code)
    if defined is None:
        code = prompt + _completion(code)
    else:
        mine = _definition(name, prompt)
        if not fenced:  # what follows may be anything
            line = code.find("\n", defined) + 1 or len(code)
            code = code[:line] + _completion(code[line:])
        code = f"{prompt[:mine]}\n{code}"  # imports and helpers
    return f"{code}\n\n{item.meta['test']}\n\ncheck({name})\n"


def _definition(name: str, code: str) -> int | None:
    """Where the line stands that begins the function; None: there is none."""
    found = re.search(rf"^(?:async )?def {name}\b", code, re.MULTILINE)
    return found and found.start()


def _completion(code: str) -> str:
    """Code up to the first line that leaves the function."""
    found = _BEHIND.search(code)
    return code[: found.start()] if found else code
