"""Where a context is compressed.

The harness hands over a context as one text. What is in front of the point is prefilled
and compressed; what is behind it, at least one token, is read through the compressed
cache before anything is scored or generated. So no score comes from a prompt's own
logits, which do not know the compression.
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, final

from kvjax.fields import Checked, Range
from kvjax.messages import nearest, shown

Encode = Callable[[str], Sequence[int]]

REMEDY = "Expected `last:N`, as in last:1, or `marker:TEXT`, as in marker:Question:."


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractRule(Checked, abc.ABC):
    """Where contexts are compressed."""

    named: ClassVar[bool] = False

    @abc.abstractmethod
    def rest(self, text: str, ids: Sequence[int], held: int, encode: Encode) -> int:
        """How many of a context's last tokens are behind the point.

        Args:
            text: the context.
            ids: its tokens.
            held: how many of them, from the end, the model reads.
            encode: tokens of a text, as the context was encoded.

        Returns:
            Less than `held`; 0 only where that is 1.

        Raises:
            ValueError: the context has no such point.
        """

    @abc.abstractmethod
    def __str__(self) -> str:
        """As `compress_at` reads it."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LastTokens(AbstractRule):
    """In front of the last tokens. Scores of the compression see a question there.

    Attributes:
        tokens: how many are read through the compressed cache; of a context that is
            no longer, all but its first one.
    """

    tokens: Annotated[int, Range(1)] = 1

    def rest(self, text, ids, held, encode):
        del text, ids, encode
        return min(self.tokens, held - 1)

    def __str__(self):
        return f"last:{self.tokens}"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Marker(AbstractRule):
    """In front of the last occurrence of a text, so that scores do not see the rest.

    Attributes:
        text: what the rest begins with: "Question:".
    """

    text: str

    def __post_init__(self):
        super().__post_init__()
        if not self.text.strip():
            raise ValueError(
                "a marker must be a text that is no space, as in marker:Question:; "
                f"got {shown(self.text)}."
            )

    def rest(self, text, ids, held, encode):
        at = text.rfind(self.text)
        if at < 0:
            raise ValueError(
                f"has no {shown(self.text)}, where it should be compressed. Name a "
                "text that all of them have, or use last:N."
            )
        # A token may reach over the point: those in front of it are what both have.
        front = _common(encode(text[:at]), ids)
        if front <= _common(encode(""), ids):
            raise ValueError(
                f"begins with {shown(self.text)}: nothing is in front of it that could "
                "be compressed. Give examples (num_fewshot), or use last:N."
            )
        rest = max(1, len(ids) - front)
        if rest >= held:
            raise ValueError(
                f"is cut to its last {held} tokens, for the model reads no more, and "
                f"{shown(self.text)} is in front of them. Use last:N, fewer examples, "
                "or a larger max_length."
            )
        return rest

    def __str__(self):
        return f"marker:{self.text}"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens with which both begin."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in same)


def rule_of(rule: Any) -> AbstractRule:
    """A rule of its text.

    Args:
        rule: `last:N`, `marker:TEXT`, or a rule as it is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(rule, AbstractRule):
        return rule
    if not isinstance(rule, str):
        raise ValueError(f"`compress_at` got {shown(rule)}. {REMEDY}")
    kind, colon, value = rule.partition(":")
    if kind == "marker" and colon:
        return Marker(text=value)
    if kind == "last" and value.isascii() and value.isdigit() and len(value) < 10:
        return LastTokens(tokens=int(value))
    hint = nearest(kind, ("last", "marker")) if kind not in ("last", "marker") else ""
    raise ValueError(f"`compress_at` got {shown(rule)}. {REMEDY}{hint}")
