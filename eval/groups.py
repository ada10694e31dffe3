"""What cells share: the prompts of one task at one length and visibility.

A group reads its prompts in batches of one shape, the last one filled up with repeated
rows that nobody scores, so that each program compiles once.
"""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVCache
from kvjax.eval.text import Tokenizer
from kvjax.models.padding import pad_rows
from kvjax.models.prompts import CompressedPrompt, Prompt

if TYPE_CHECKING:  # what reads groups
    from kvjax.eval.reading import PromptReader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What a batch gave to one question after its prompts were compressed.

    Attributes:
        items: per scored row, the columns of `results.ITEMS` that it fills; None for a
            row without such a question.
        ask_s: wall time of reading the question, compilation aside.
        decode_s: the same of decoding.
        steps: decode steps that ran.
        compile_s: time spent compiling.
        told: of the first prompt of all, by name a number for each token that was
            predicted; None where nothing was told.
    """

    items: tuple[Mapping[str, Any] | None, ...]
    ask_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0
    compile_s: float = 0.0
    told: Mapping[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractGroup(abc.ABC):
    """Prompts that every method reads.

    Attributes:
        title: what rows call the task.
        length: tokens of prompt and answer, at most.
        visibility: where the compression point lies.
        depths: the needle's depths, or one None; prompts are listed depth by depth.
        turns: questions that are asked of each prompt.
        prompts: token ids that are read before compression.
        batch: rows of a batch.
        width: tokens that prompts are padded to.
        tokenizer: of the model.
        seed: of the items, or None if nothing is drawn.
    """

    title: str
    length: int
    visibility: str
    depths: tuple[float | None, ...]
    turns: int = 1
    prompts: tuple[tuple[int, ...], ...]
    batch: int
    width: int
    tokenizer: Tokenizer
    seed: int | None = None

    @functools.cached_property
    def source(self) -> str:
        """Digest of what is asked: of its tokens, and of what is right about them."""
        total = hashlib.sha256()
        rows = (np.asarray(row, "<i4").tobytes() for row in self.prompts)
        for data in (*rows, *self.asks_for()):
            total.update(f"{len(data)} ".encode() + data)
        return total.hexdigest()[:16]

    @abc.abstractmethod
    def asks_for(self) -> Iterator[bytes]:
        """What is read behind the prompts, and what is right."""

    @property
    @abc.abstractmethod
    def room(self) -> int:
        """Tokens that follow the compression point, at most."""

    @abc.abstractmethod
    def answer(
        self,
        reader: "PromptReader",
        cache: KVCache,
        prompt: Prompt | CompressedPrompt,
        index: np.ndarray,
    ) -> list[Answers]:
        """Answers of a batch whose rows are the prompts `index`, fill-up included.

        One entry for each turn.

        Args:
            reader: what read the prompts.
            cache: of the prompts, compressed.
            prompt: what it was made of.
            index: which prompts.
        """

    @abc.abstractmethod
    def shown(self, item: int) -> tuple[str, str]:
        """Text that is compressed, and the question behind it, of one item."""

    def asks(self, item: int, turn: int) -> bool:
        """Whether the prompt has so many questions; turns count from 0."""
        del item
        return turn < self.turns

    @property
    def per_depth(self) -> int:
        """Items of each depth."""
        return len(self.prompts) // len(self.depths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every prompt."""
        return np.array([len(prompt) for prompt in self.prompts], np.int32)

    def batches(self) -> Iterator[np.ndarray]:
        """Indices of the prompts of each batch, the last one filled up."""
        count = len(self.prompts)
        for start in range(0, count, self.batch):
            # Row 0 of the batch again: it never decodes longer than the batch.
            index = np.arange(start, start + self.batch)
            yield np.where(index < count, index, start)

    def read(self, index: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Padded tokens and lengths of a batch."""
        tokens, lengths = pad_rows([self.prompts[i] for i in index], self.width)
        return jnp.asarray(tokens), jnp.asarray(lengths)

    def scored(self, index: np.ndarray) -> int:
        """Rows of the batch that are not fill-up."""
        return int(min(self.batch, len(self.prompts) - index[0]))
