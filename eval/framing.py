"""How contexts, questions and replies become a model's tokens: as text, or as a chat.

The model reads `opening context question closing prefix` and goes on behind it; in a
session, `between` and the next question follow the reply. Without a template this is
what kvpress does (a line break closes a question), and with one, too.
"""

import dataclasses
from collections.abc import Sequence

from kvjax.eval.tasks import Episode, Task, Turn
from kvjax.eval.text import Tokenizer
from kvjax.messages import shown
from kvjax.models.templates import TemplateFault, written

_ASKED, _REPLY, _NEXT = "kvjax-first", "kvjax-second", "kvjax-third"
_GAP = "\n\n"
"""Between a reply and the next question, where no template says it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Framing:
    """Text around the texts of a task, and tokens of both.

    What is read at once is encoded at once, as one text.

    Attributes:
        tokenizer: of the model.
        opening: before a context.
        closing: between a question and the prefix of its reply.
        end: behind a reply.
        between: behind that, before the next question.
        begin: ids in front of everything.
        ends: ids that end a reply.
        chat: whether the texts are of a chat template.
    """

    tokenizer: Tokenizer
    opening: str = ""
    closing: str = ""
    end: str = ""
    between: str = ""
    begin: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    chat: bool = False

    def prompt(self, episode: Episode, *, aware: bool = False) -> tuple[int, ...]:
        """What is read before the compression: the context, and perhaps a question."""
        question = episode.turns[0].question if aware else ""
        text = self.opening + episode.context + question
        return (*self.begin, *self.tokenizer.encode(text))

    def asked(
        self, turn: Turn, before: Turn | None = None, *, question: bool = True
    ) -> tuple[int, ...]:
        """What is read then, before a reply.

        Args:
            turn: what is asked.
            before: the turn before it, whose perfect reply is read first; None: this
                one is asked of the context alone.
            question: whether the question is still to be read.
        """
        text = self.said(before.answer) if before else ""
        text += (turn.question if question else "") + self.closing + turn.prefix
        return tuple(self.tokenizer.encode(text))

    def said(self, reply: str) -> str:
        """A reply and what stands before the next question."""
        return reply + self.end + self.between

    def stops(self, task: Task) -> tuple[int, ...]:
        """Tokens that end a reply to the task."""
        own = self.tokenizer.stops(task.stop) if task.stop else ()
        return tuple(sorted({*own, *self.ends}))

    def measure(self, task: Task, episode: Episode) -> int:
        """Tokens of an episode behind `begin`, with room for its replies.

        Replies of records are as long as their answers, those in words have
        `max_new_tokens`.
        """
        total, before = len(self.prompt(episode)) - len(self.begin), None
        for turn in episode.turns:
            total += len(self.asked(turn, before))
            before = turn
        if not task.chat:
            return total + len(self.tokenizer.encode(episode.turns[-1].answer))
        return total + limit(task, episode.turns[-1])


def limit(task: Task, turn: Turn) -> int:
    """Tokens of a reply, at most."""
    return turn.max_new_tokens or task.max_new_tokens


def framing(
    tokenizer: Tokenizer,
    task: Task,
    chat: str = "auto",
    ends: Sequence[int] = (),
    thinking: bool = False,
) -> Framing:
    """How a task is put to a model.

    Args:
        tokenizer: of the model.
        task: what is asked.
        chat: `always` by the chat template, `never`, or `auto`: by it where there is
            one and the task is in words.
        ends: ids that end what the model writes.
        thinking: templates that know `enable_thinking` are told so.

    Raises:
        ValueError: `always`, and there is no template; a template that refuses a plain
            question, or writes it another way.
    """
    has = tokenizer.has_template
    if chat == "always" and not has:
        raise ValueError(
            "`chat` is 'always', and the tokenizer has no chat template. Use 'auto' or "
            "'never', or a model that is made for chats."
        )
    if chat == "never" or not has or (chat == "auto" and not task.chat):
        return _plain(tokenizer, task, ends)
    return _chat(tokenizer, task, ends, thinking)


def _plain(tokenizer: Tokenizer, task: Task, ends: Sequence[int]) -> Framing:
    begin = tuple(tokenizer.prefix)
    if not task.chat:  # its replies have a stop of their own
        return Framing(tokenizer=tokenizer, begin=begin)
    return Framing(
        tokenizer=tokenizer,
        opening=task.system + _GAP if task.system else "",
        closing="\n",
        between=_GAP,
        begin=begin,
        ends=tuple({*ends, *tokenizer.ends}),
    )


def _chat(
    tokenizer: Tokenizer, task: Task, ends: Sequence[int], thinking: bool
) -> Framing:
    system = [{"role": "system", "content": task.system}] if task.system else []
    lead = ""
    try:
        text = _written(tokenizer, system, thinking)
    except TemplateFault:
        if not system:
            raise
        text = ""
    if task.system not in text or not text:  # the template has no such role
        text, lead = _written(tokenizer, [], thinking), task.system + _GAP
    opening, rest = text.split(_ASKED)
    closing, rest = rest.split(_REPLY)
    between, _ = rest.split(_NEXT)
    last = [t for t in tokenizer.encode(between)[:1] if tokenizer.is_special(t)]
    end = "".join(map(tokenizer.piece, last))
    return Framing(
        tokenizer=tokenizer,
        opening=opening + lead,
        closing=closing,
        end=end,
        between=between.removeprefix(end),
        ends=tuple({*ends, *tokenizer.ends, *last}),
        chat=True,
    )


def _written(tokenizer: Tokenizer, system: list[dict[str, str]], thinking: bool) -> str:
    """A chat of two questions as the template writes it.

    Raises:
        ValueError: a text is not in it once, in its place.
    """
    chat = [
        *system,
        {"role": "user", "content": _ASKED},
        {"role": "assistant", "content": _REPLY},
        {"role": "user", "content": _NEXT},
    ]
    made = written(tokenizer.raw, chat, ask=True, thinking=thinking)
    # The first question alone says what is written before a reply: what some templates
    # add there for a reply to come is not in front of an earlier one.
    asked = written(tokenizer.raw, chat[: len(system) + 1], ask=True, thinking=thinking)
    counts = [made.count(mark) for mark in (_ASKED, _REPLY, _NEXT)]
    if [*counts, asked.count(_ASKED)] != [1, 1, 1, 1]:
        raise TemplateFault(
            f"the chat template does not write each message once: {shown(made)}. Use "
            "`chat: never`, or mend the template."
        )
    opening, closing = asked.split(_ASKED)
    return opening + _ASKED + closing + made[made.index(_REPLY) :]
