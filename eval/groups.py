"""What cells share: the prompts of one task at one length and visibility.

A group reads its prompts in batches of one shape, the last one filled up with repeated
rows that nobody scores, so that each program compiles once.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVCache
from kvjax.eval.replies import greedy_replies
from kvjax.eval.tasks import Item, Task
from kvjax.eval.text import Tokenizer
from kvjax.models.padding import bucket, pad_rows
from kvjax.models.prompts import Prompt

if TYPE_CHECKING:  # what reads groups
    from kvjax.eval.reading import PromptReader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What a batch gave after its prompts were compressed.

    Attributes:
        items: per scored row, the columns of `results.ITEMS` that it fills.
        decode_s: wall time of decoding, compilation aside.
        steps: decode steps that ran.
        compile_s: time spent compiling.
    """

    items: tuple[Mapping[str, Any], ...]
    decode_s: float
    steps: int
    compile_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractGroup(abc.ABC):
    """Prompts that every method reads.

    Attributes:
        title: what rows call the task.
        length: tokens of prompt and answer, at most.
        visibility: where the compression point lies.
        depths: the needle's depths, or one None; prompts are listed depth by depth.
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
    prompts: tuple[tuple[int, ...], ...]
    batch: int
    width: int
    tokenizer: Tokenizer
    seed: int | None = None

    @property
    @abc.abstractmethod
    def room(self) -> int:
        """Tokens that follow the compression point, at most."""

    @abc.abstractmethod
    def answer(
        self, reader: "PromptReader", cache: KVCache, prompt: Prompt, index: np.ndarray
    ) -> Answers:
        """Answers of a batch whose rows are the prompts `index`, fill-up included.

        Args:
            reader: what read the prompts.
            cache: of the prompts, compressed.
            prompt: what it was made of.
            index: which prompts.
        """

    @abc.abstractmethod
    def shown(self, item: int) -> tuple[str, str]:
        """Text that is compressed, and the question behind it, of one item."""

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


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionGroup(AbstractGroup):
    """Items of a generated task.

    Query-agnostic prompts are contexts; their questions are read through the
    compressed cache. Query-aware prompts end with the question and are compressed
    behind it: the first token of a reply then comes from the uncompressed prompt,
    which is why every answer has at least two tokens.

    Attributes:
        task: scores the replies.
        items: one per prompt.
        questions: token ids read after compression; empty where prompts hold them.
        reply_tokens: least room for a reply.
    """

    task: Task
    items: tuple[Item, ...]
    questions: tuple[tuple[int, ...], ...]
    reply_tokens: int

    @property
    def reply_room(self) -> int:
        """Tokens decoded at most: a bucket, which tasks share programs by."""
        return bucket(max(self.task.max_new_tokens, self.reply_tokens))

    @property
    def question_room(self) -> int:
        """Tokens of the longest question, bucketed; 0 if prompts hold them."""
        longest = max(map(len, self.questions))
        return bucket(longest) if longest else 0

    @property
    def room(self):
        return self.question_room + self.reply_room

    def shown(self, item):
        one = self.items[item]
        if self.question_room:
            return one.context, one.question
        return one.prompt, ""

    def answer(self, reader, cache, prompt, index):
        questions = None
        if self.question_room:
            questions = pad_rows([self.questions[i] for i in index], self.question_room)
        given = greedy_replies(
            reader.model,
            cache,
            prompt.logits,
            questions,
            max_new_tokens=self.reply_room,
            stop_tokens=self.tokenizer.stops(self.task.stop),
        )
        scored = self.scored(index)
        replied = zip(index[:scored], given.tokens[:scored], strict=True)
        return Answers(
            items=tuple(self._score(int(i), tokens) for i, tokens in replied),
            decode_s=given.decode_s,
            steps=given.steps,
            compile_s=given.compile_s,
        )

    def _score(self, i: int, tokens: np.ndarray) -> dict[str, Any]:
        item = self.items[i]
        text = self.tokenizer.decode(tokens[: self.task.max_new_tokens].tolist())
        reply = self.task.cut(text)
        score = float(self.task.score(item, reply))
        return {"reply": reply, "answer": item.answer, "score": score}
