"""Tasks of an evaluation as groups: episodes made, and what is read when."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvjax.eval.config import NEEDLE, SESSION, TEXT, EvalConfig, TaskEntry
from kvjax.eval.framing import Framing, framing
from kvjax.eval.questions import QuestionGroup
from kvjax.eval.tasks import TASKS, Episode, Task, make_task
from kvjax.eval.text import Tokenizer
from kvjax.messages import nearest
from kvjax.models.padding import bucket

AWARE = "query_aware"


def groups(
    entry: TaskEntry, config: EvalConfig, tokenizer: Tokenizer, ends: Sequence[int]
) -> Iterator[QuestionGroup]:
    """The groups of a task: one per length and visibility, and per part of it.

    Args:
        entry: the task.
        config: of the evaluation.
        tokenizer: of the model.
        ends: ids that end what the model writes.

    Raises:
        ValueError: unknown tasks or fields; a length that does not fit it; characters
            without tokens; questions that cannot be asked so.
    """
    depths = config.depths if entry.depths else (None,)
    visible = entry.visibility or config.visibility
    if entry.turns > 1 and entry.mode != SESSION and AWARE in visible:
        raise ValueError(
            f"task {entry.title!r}: a cache that is compressed behind its question "
            "serves no other. Ask them in a session (`mode: session`), or compress "
            "before them (`visibility: [query_agnostic]`)."
        )
    makers = [parts(entry, depth) for depth in depths]
    for part in makers[0]:
        tasks = [made[part] for made in makers]
        title = f"{entry.title}_{part}" if part else entry.title
        frame = framing(tokenizer, tasks[0], config.chat, ends, config.thinking)
        for length in entry.lengths or config.lengths:
            episodes = [
                one
                for task in tasks
                for one in _episodes(task, frame, entry, config, length)
            ]
            texts = (text for one in episodes for text in _texts(one))
            tokenizer.check(f"task {title!r}", texts)
            for visibility in visible:
                yield _group(
                    entry,
                    config,
                    frame,
                    episodes,
                    task=tasks[0],
                    title=title,
                    length=length,
                    visibility=visibility,
                    depths=depths,
                )


def parts(entry: TaskEntry, depth: float | None = None) -> Mapping[str, Task]:
    """What an entry asks, by the names of its parts; of most it is one, without name.

    Raises:
        ValueError: unknown tasks or fields.
    """
    known = [*TASKS, NEEDLE, TEXT]
    if entry.name not in known:
        raise ValueError(
            f"Unknown task {entry.name!r}; expected one of {known}."
            f"{nearest(entry.name, known)}"
        )
    fields = dict(entry.fields)
    if not entry.depths:
        return make_task(entry.name, **fields).parts()
    if "depth" in fields:
        raise ValueError(f"task {entry.title!r} takes its depths from `depths`.")
    name = entry.name
    if name == NEEDLE:
        name, fields = "recall", {"value_length": 4, **fields}
    return make_task(name, **fields, depth=depth).parts()


def _episodes(
    task: Task, frame: Framing, entry: TaskEntry, config: EvalConfig, length: int
) -> Sequence[Episode]:
    return task.episodes(
        config.seed,
        entry.items or config.items,
        max(1, length - len(frame.begin)),
        lambda episode: frame.measure(task, episode),
        entry.turns,
    )


def _texts(episode: Episode) -> Iterator[str]:
    yield episode.context
    for turn in episode.turns:
        yield from (turn.question, turn.prefix, turn.answer, *turn.choices)


def _group(
    entry: TaskEntry,
    config: EvalConfig,
    frame: Framing,
    episodes: Sequence[Episode],
    *,
    visibility: str,
    **about: Any,
) -> QuestionGroup:
    made = [_tokens(one, frame, entry, visibility) for one in episodes]
    if any(asked[0] for _, asked in made) or any(
        turn.choices for one in episodes for turn in one.turns
    ):
        made = [_held_back(*one) for one in made]
    prompts = tuple(prompt for prompt, _ in made)
    return QuestionGroup(
        visibility=visibility,
        turns=min(entry.turns, max(len(one.turns) for one in episodes)),
        prompts=prompts,
        batch=min(config.batch, len(prompts)),
        width=bucket(max(map(len, prompts))),
        tokenizer=frame.tokenizer,
        seed=config.seed,
        framing=frame,
        episodes=tuple(episodes),
        asked=tuple(asked for _, asked in made),
        mode=entry.mode,
        golden=entry.golden,
        reply_tokens=config.reply_tokens,
        **about,
    )


Read = tuple[tuple[int, ...], ...]


def _tokens(
    episode: Episode, frame: Framing, entry: TaskEntry, visibility: str
) -> tuple[tuple[int, ...], Read]:
    """The prompt of an episode, and what is read behind it, turn by turn."""
    aware, asked, before = visibility == AWARE, [], None
    for number, turn in enumerate(episode.turns[: entry.turns]):
        hidden = number > 0 or not aware
        asked.append(frame.asked(turn, before, question=hidden))
        before = turn if entry.mode == SESSION and entry.golden else None
    return frame.prompt(episode, aware=aware), tuple(asked)


def _held_back(prompt: tuple[int, ...], asked: Read) -> tuple[tuple[int, ...], Read]:
    """At least one token is read through the compressed cache before a reply."""
    if asked[0]:
        return prompt, asked
    return prompt[:-1], (prompt[-1:], *asked[1:])


def files_of(entry: TaskEntry) -> Mapping[str, Any]:
    """Files that a task reads, by the names that its fields give."""
    found: dict[str, Any] = {}
    depth = 0.0 if entry.depths else None
    for task in parts(entry, depth).values():
        found |= task.files()
    return found
