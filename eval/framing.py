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

_LONG = " ".join(map(str, range(1000)))
_CHATS = (
    ("kvjax-first", "kvjax-second", "kvjax-third"),
    ("A text.\n\nWhat is in it?", "It has\ntwo lines.", "And who wrote it?"),
    ("<i>A</i> &  'b'\t\"c\"?", "<i>B</i> &  'c'\t\"d\".", "<i>C</i> &  'd'\t\"e\"?"),
    (f"What is behind {_LONG}?", f"Behind {_LONG}.", f"In front of {_LONG}?"),
)
"""Question, reply and question: what is around them must not depend on them."""

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
        return tuple(self.tokenizer.going_on(text))

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
    if has and (chat == "always" or (chat == "auto" and task.chat)):
        return chat_framing(tokenizer, task.system, ends, thinking)
    if task.chat:
        return plain_framing(tokenizer, task.system, ends)
    # Its replies have a stop of their own.
    return Framing(tokenizer=tokenizer, begin=tuple(tokenizer.prefix))


def plain_framing(
    tokenizer: Tokenizer, system: str = "", ends: Sequence[int] = ()
) -> Framing:
    """Texts in words without a template: a line break closes a question.

    Args:
        tokenizer: of the model.
        system: stands before a context.
        ends: ids that end what the model writes.
    """
    return Framing(
        tokenizer=tokenizer,
        opening=system + _GAP if system else "",
        closing="\n",
        between=_GAP,
        begin=tuple(tokenizer.prefix),
        ends=tuple({*ends, *tokenizer.ends}),
    )


def chat_framing(
    tokenizer: Tokenizer,
    system: str = "",
    ends: Sequence[int] = (),
    thinking: bool = False,
) -> Framing:
    """Texts as messages, as the template of the tokenizer writes them.

    Args:
        tokenizer: of the model.
        system: a message of the system; begins the first question where the template
            has no such role.
        ends: ids that end what the model writes.
        thinking: templates that know `enable_thinking` are told so.

    Raises:
        TemplateFault: the template refuses a plain question, or writes it another way.
    """
    said = [{"role": "system", "content": system}] if system else []
    lead, before, closing, between = "", "", "", ""
    try:
        before, closing, between = _around(tokenizer, said, thinking)
    except TemplateFault:
        if not said:
            raise
    # The template has no such role, or writes its message before the newest question.
    if said and (system not in before or system in between):
        before, closing, between = _around(tokenizer, [], thinking)
        lead = system + _GAP
    last = [t for t in tokenizer.encode(between)[:1] if tokenizer.is_special(t)]
    end = "".join(map(tokenizer.piece, last))
    return Framing(
        tokenizer=tokenizer,
        opening=before + lead,
        closing=closing,
        end=end,
        between=between.removeprefix(end),
        ends=tuple({*ends, *tokenizer.ends, *last}),
        chat=True,
    )


def _around(
    tokenizer: Tokenizer, system: list[dict[str, str]], thinking: bool
) -> tuple[str, str, str]:
    """What a template writes before a question, behind it, and behind a reply.

    Raises:
        TemplateFault: a text is not in it once, in its place, or others change that.
    """
    one, *others = (_written(tokenizer, system, texts, thinking) for texts in _CHATS)
    for other in others:
        if one != other:
            raise TemplateFault(
                "the chat template writes another text around other messages: "
                f"{shown(''.join(one))} and {shown(''.join(other))}. {_REMEDY}"
            )
    return one


_REMEDY = "Mend the template, or ask without it."


def _written(
    tokenizer: Tokenizer,
    system: list[dict[str, str]],
    texts: tuple[str, str, str],
    thinking: bool,
) -> tuple[str, str, str]:
    """`_around` of a chat of two questions."""
    roles = ("user", "assistant", "user")
    chat = [
        {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
    ]
    made = _chat_text(tokenizer, [*system, *chat], thinking)
    # The first question alone says what is written before a reply: what some templates
    # add there for a reply to come is not in front of an earlier one.
    asked = _chat_text(tokenizer, [*system, chat[0]], thinking)
    counts = [made.count(text) for text in texts]
    first, reply, following = texts
    if [*counts, asked.count(first)] != [1, 1, 1, 1]:
        raise TemplateFault(
            "the chat template does not write each message once, as it is: "
            f"{shown(made)}. {_REMEDY}"
        )
    if not made.index(first) < made.index(reply) < made.index(following):
        raise TemplateFault(
            f"the chat template does not write messages in their order: {shown(made)}. "
            f"{_REMEDY}"
        )
    opening, closing = asked.split(first)
    between, _ = made[made.index(reply) + len(reply) :].split(following)
    return opening, closing, between


def _chat_text(tokenizer: Tokenizer, chat: list[dict[str, str]], thinking: bool) -> str:
    try:
        return written(tokenizer.raw, chat, ask=True, thinking=thinking)
    except TemplateFault as wrong:
        raise TemplateFault(
            f"the chat template refuses plain questions ({wrong}). {_REMEDY}"
        ) from wrong
