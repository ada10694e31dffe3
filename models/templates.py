"""Chat templates, programs of somebody else: their errors, and one that never ends."""

import contextlib
import ctypes
import functools
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

SECONDS = 5.0
"""What a template may take for a chat: thousands of times what it takes."""

MOST = 1 << 24
"""Characters that a template may write."""


class TemplateFault(ValueError):
    """A template that raises, or writes what is no chat; says it in its own words."""


class EndlessTemplate(ValueError):
    """A template that goes on and on."""


class _Late(Exception):
    """Raised inside of a template from outside."""


def written(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any] | None = None,
    *,
    ask: bool = False,
    thinking: bool | None = None,
    go_on: bool = False,
) -> str:
    """The text of a chat, by the tokenizer's template.

    Args:
        tokenizer: has the template.
        messages: of the chat.
        tools: that the template tells of.
        ask: for another answer.
        thinking: what templates that know `enable_thinking` are told.
        go_on: without what ends the last message, which is to be continued.

    Raises:
        TemplateFault: the template refuses the chat.
        EndlessTemplate: it does not end.
    """
    options: dict[str, Any] = {"continue_final_message": True} if go_on else {}
    if thinking is not None:
        options["enable_thinking"] = thinking
    try:
        check_steps(tokenizer.get_chat_template(tools=list(tools) if tools else None))
        with bounded():
            # As a batch of one: the library takes no empty chat by itself.
            (text,) = tokenizer.apply_chat_template(
                [list(messages)],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=ask,
                **options,
            )
    except (EndlessTemplate, TemplateFault):
        raise
    # Templates run what they like, and raise what that raises.
    except Exception as wrong:
        raise TemplateFault(f"{type(wrong).__name__}: {str(wrong)[:200]}") from wrong
    if len(text) > MOST:
        raise TemplateFault(f"it writes {len(text)} characters; at most {MOST} may be")
    return text


@functools.lru_cache(64)
def check_steps(template: str) -> None:
    """Refuse a power: Python computes it in one step, which nothing can stop.

    Raises:
        TemplateFault: there is one.
        jinja2.TemplateSyntaxError: this is no template.
    """
    import jinja2

    lexed = jinja2.Environment().lex(template)
    pieces = [(kind, piece) for _, kind, piece in lexed if kind != "whitespace"]
    for (_, before), piece in itertools.pairwise(pieces):
        if piece == ("operator", "**") and before not in ("(", ","):  # of arguments
            raise TemplateFault("it uses `**`, a step that may never end")


@contextlib.contextmanager
def bounded(seconds: float | None = None) -> Iterator[None]:
    """While inside, this thread is stopped behind `seconds`; None: `SECONDS`.

    Raises:
        EndlessTemplate: that was so.
    """
    limit, here = SECONDS if seconds is None else seconds, threading.get_ident()
    WATCH.begin(here, limit)
    try:
        try:
            yield
        finally:
            WATCH.end(here)
    except _Late:
        WATCH.end(here)
        raise EndlessTemplate(
            f"the chat template has not ended within {limit:g} seconds. Mend it, or "
            "take one that ends."
        ) from None


class Watch:
    """A thread that stops others, once for all chats: to start one takes its time."""

    def __init__(self):
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def begin(self, thread: int, seconds: float) -> None:
        """Stop a thread in so many seconds."""
        with self._lock:
            self._ends[thread] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():  # or was forked
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def end(self, thread: int) -> None:
        """Let it be."""
        with self._lock:
            self._ends.pop(thread, None)

    def _run(self) -> None:
        while True:
            time.sleep(0.05)
            with self._lock:
                now = time.monotonic()
                for thread, end in self._ends.items():
                    if now > end:
                        self._ends[thread] = now + 1.0  # again, if that was caught
                        _raise_in(thread)


WATCH = Watch()


def _raise_in(thread: int) -> None:
    """Let Python raise `_Late` in a thread at its next step."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(_Late)
    )
