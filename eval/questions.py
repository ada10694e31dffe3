"""Questions about contexts: asked of one cache each, or one after the other."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import KVCache
from kvjax.eval.config import REQUESTS, SESSION
from kvjax.eval.framing import Framing, limit
from kvjax.eval.groups import AbstractGroup, Answers
from kvjax.eval.replies import ask, greedy_replies
from kvjax.eval.tasks import Episode, Task
from kvjax.eval.timing import timed
from kvjax.models.decoder import Decoder
from kvjax.models.inference import extend
from kvjax.models.padding import bucket, pad_rows


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionGroup(AbstractGroup):
    """Episodes of a task.

    Query-agnostic prompts are contexts; their questions are read through the
    compressed cache. Query-aware prompts end with the (first) question and are
    compressed behind it. What a template or the task puts behind a question is read
    through the compressed cache, too; where there is nothing, the first token of a
    reply comes from the uncompressed prompt, and all others from the cache.

    Several turns are `requests` (each is asked of the cache that the prompt left, which
    stays as it is) or a `session` (the cache goes on, with a reply between questions).

    Attributes:
        task: scores the replies.
        framing: how it is put to the model.
        episodes: one per prompt.
        asked: per prompt and turn, token ids that are read before the reply; in a
            session, those between the turns among them.
        mode: `requests` or `session`.
        golden: in a session, perfect replies stand between the turns; else the model's.
        reply_tokens: least room for a reply.
    """

    task: Task
    framing: Framing
    episodes: tuple[Episode, ...]
    asked: tuple[tuple[tuple[int, ...], ...], ...]
    mode: str = REQUESTS
    golden: bool = True
    reply_tokens: int

    def asks_for(self):
        for turns in self.asked:
            yield from (np.asarray(one, "<i4").tobytes() for one in turns)
        for episode in self.episodes:
            asked = (dataclasses.astuple(turn) for turn in episode.turns)
            yield from (repr(one).encode() for one in asked)

    @property
    def reply_room(self) -> int:
        """Tokens decoded at most: a bucket, which tasks share programs by."""
        turns = (turn for one in self.episodes for turn in one.turns)
        most = max(limit(self.task, turn) for turn in turns)
        return bucket(max(most, self.reply_tokens))

    @property
    def question_room(self) -> int:
        """Tokens read before a reply, bucketed; 0 if prompts hold them all."""
        longest = max(len(one) for turns in self.asked for one in turns)
        if self.mode == SESSION and not self.golden:
            longest += self.reply_room
        return bucket(longest) if longest else 0

    @property
    def room(self):
        turns = self.turns if self.mode == SESSION else 1
        return turns * self.question_room + self.reply_room

    def asks(self, item, turn):
        return turn < min(self.turns, len(self.episodes[item].turns))

    def shown(self, item):
        one = self.episodes[item]
        if self.visibility == "query_aware":
            return one.item().prompt, ""
        return one.context, one.turns[0].question

    def answer(self, reader, cache, prompt, index):
        model, logits, said = reader.model, prompt.logits, [()] * len(index)
        out = []
        for turn in range(self.turns):
            rows = [
                (*own, *self._asked(int(i), turn))
                for own, i in zip(said, index, strict=True)
            ]
            now, ask_s, compile_s = cache, 0.0, 0.0
            if any(rows):
                done = timed(lambda c=cache, r=rows: self._ask(model, c, r))
                (logits, now), compile_s = done.value, done.compile_s
                ask_s = done.run_s
            given, said = self._reply(model, now, logits, index, turn)
            out.append(
                dataclasses.replace(
                    given, ask_s=ask_s, compile_s=given.compile_s + compile_s
                )
            )
            if self.mode == SESSION:
                cache = now
        return out

    def _ask(
        self, model: Decoder, cache: KVCache, rows: Sequence[tuple[int, ...]]
    ) -> tuple[Array, KVCache]:
        return ask(model, cache, *pad_rows(rows, self.question_room))

    def _asked(self, i: int, turn: int) -> tuple[int, ...]:
        """What is read at a turn; an episode without it repeats its last, unscored."""
        return self.asked[i][min(turn, len(self.asked[i]) - 1)]

    def _reply(
        self,
        model: Decoder,
        cache: KVCache,
        logits: Array,
        index: np.ndarray,
        turn: int,
    ) -> tuple[Answers, list[tuple[int, ...]]]:
        """The replies of a batch, and what the next turn of a session reads of them."""
        turns = [self._turn(int(i), turn) for i in index]
        if any(one.choices for one in turns):
            chosen = timed(lambda: self._choose(model, cache, logits, turns))
            texts = chosen.value
            given = Answers(items=(), decode_s=0.0, steps=0, compile_s=chosen.compile_s)
        else:
            replies = greedy_replies(
                model,
                cache,
                logits,
                max_new_tokens=self.reply_room,
                stop_tokens=self.framing.stops(self.task),
            )
            texts = [
                self._text(tokens[: limit(self.task, one)].tolist())
                for one, tokens in zip(turns, replies.tokens, strict=True)
            ]
            given = Answers(
                items=(),
                decode_s=replies.decode_s,
                steps=replies.steps,
                compile_s=replies.compile_s,
            )
        items = tuple(self._items(index, turn, texts))
        said = [()] * len(index)
        if self.mode == SESSION and not self.golden:
            encode = self.tokenizer.going_on
            said = [tuple(encode(self.framing.said(text))) for text in texts]
        return dataclasses.replace(given, items=items), said

    def _text(self, tokens: list[int]) -> str:
        return self.task.cut(self.tokenizer.decode(tokens))

    def _turn(self, i: int, turn: int):
        turns = self.episodes[i].turns
        return turns[min(turn, len(turns) - 1)]

    def _items(
        self, index: np.ndarray, turn: int, texts: Sequence[str]
    ) -> Iterator[dict[str, Any] | None]:
        """The scored rows."""
        scored = self.scored(index)
        for i, text in zip(index[:scored], texts[:scored], strict=True):
            one = self.episodes[int(i)]
            if turn >= len(one.turns):
                yield None
                continue
            score = float(self.task.score(one.turns[turn], text))
            yield {"reply": text, "answer": one.turns[turn].answer, "score": score}

    def _choose(
        self, model: Decoder, cache: KVCache, logits: Array, turns: Sequence[Any]
    ) -> list[str]:
        """The likeliest choice of each row, by the sum over its tokens."""
        most = max(len(one.choices) for one in turns)
        encode = self.framing.tokenizer.going_on
        rows = [[tuple(encode(text)) for text in one.choices] for one in turns]
        width = bucket(max(len(tokens) for row in rows for tokens in row), 1)
        found = np.full((len(turns), most), -np.inf)
        for number in range(most):
            some = [row[min(number, len(row) - 1)] for row in rows]
            tokens, lengths = pad_rows(some, width)
            after = None
            if width > 1:
                after, _ = extend(model, cache, jnp.asarray(tokens), lengths)
            likely = np.asarray(_likelihood(logits, after, tokens, lengths))
            there = [number < len(row) for row in rows]
            found[:, number] = np.where(there, likely, -np.inf)
        best = found.argmax(1)
        return [one.choices[int(n)] for one, n in zip(turns, best, strict=True)]


@jax.jit
def _likelihood(
    logits: Float[Array, "B V"],
    after: Float[Array, "B T V"] | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B"]:
    """Sum of the log-likelihoods of `tokens` behind `logits`."""
    rows = logits[:, None].astype(jnp.float32)
    if after is not None:
        rows = jnp.concatenate([rows, after[:, :-1].astype(jnp.float32)], axis=1)
    each = jnp.take_along_axis(jax.nn.log_softmax(rows), tokens[..., None], axis=-1)[
        ..., 0
    ]
    inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.sum(jnp.where(inside, each, 0.0), axis=1)
