"""What cells share: the prompts of one task at one length and visibility.

A group reads its prompts in batches of one shape, the last one filled up with repeated
rows that nobody scores, so that each program compiles once.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVCache
from kvjax.eval.tasks import Item, Task
from kvjax.eval.tasks.base import before_stop
from kvjax.eval.text import Tokenizer
from kvjax.eval.timing import timed
from kvjax.models.decoder import Decoder
from kvjax.models.generation import generate_from
from kvjax.models.inference import Prompt, bucket, extend, last_of
from kvjax.models.padding import pad_rows


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
        self, model: Decoder, cache: KVCache, prompt: Prompt, index: np.ndarray
    ) -> Answers:
        """Answers of a batch whose rows are the prompts `index`, fill-up included."""

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

    def answer(self, model, cache, prompt, index):
        logits, compile_s = prompt.logits, 0.0
        if self.question_room:
            rows = [self.questions[i] for i in index]
            asked = timed(
                lambda: _last(model, cache, *pad_rows(rows, self.question_room))
            )
            (logits, cache), compile_s = asked.value, asked.compile_s
        decoded = timed(
            lambda: generate_from(
                model,
                cache,
                logits,
                max_new_tokens=self.reply_room,
                stop_tokens=self.tokenizer.stops(self.task.stop),
            )
        )
        tokens, lengths, _ = decoded.value
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        return Answers(
            items=tuple(
                self._score(int(i), tokens[row, : lengths[row]])
                for row, i in enumerate(index[: self.scored(index)])
            ),
            decode_s=decoded.run_s,
            # The first token needs no step: its logits were there.
            steps=int(lengths.max()) - 1,
            compile_s=compile_s + decoded.compile_s,
        )

    def _score(self, i: int, tokens: np.ndarray) -> dict[str, Any]:
        item = self.items[i]
        text = self.tokenizer.decode(tokens[: self.task.max_new_tokens].tolist())
        reply = before_stop(text)
        reply = reply + self.task.stop if len(reply) < len(text) else reply
        score = float(self.task.score(item, reply))
        return {"reply": reply, "answer": item.answer, "score": score}


def _last(model: Decoder, cache: KVCache, tokens: np.ndarray, lengths: np.ndarray):
    """Logits of each row's last token, and the cache after all of them."""
    logits, cache = extend(model, cache, jnp.asarray(tokens), jnp.asarray(lengths))
    return last_of(logits, jnp.asarray(lengths)), cache
