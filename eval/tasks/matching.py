"""How right a reply is that should contain some texts."""

import re
from collections.abc import Sequence


def share_found(reply: str, references: Sequence[str]) -> float:
    """Share of the references that the reply contains, whatever their case."""
    reply = reply.lower()
    return sum(one.lower() in reply for one in references) / len(references)


def any_found(reply: str, references: Sequence[str]) -> float:
    """1 if the reply contains one of the references, whatever its case."""
    reply = reply.lower()
    return float(any(one.lower() in reply for one in references))


def numbers(reply: str) -> list[str]:
    """The runs of digits of a reply, each without zeros in front."""
    return [one.lstrip("0") or "0" for one in re.findall(r"[0-9]+", reply)]
