"""Which of a run's maps the report shows: of one text, each method at one budget."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvjax.eval.report.kept import pieces_of
from kvjax.eval.report.run import LoadedRun, group
from kvjax.eval.report.words import MOST_TOKENS
from kvjax.messages import nearest, shown

Entry = Mapping[str, Any]

MOST_MAPS = 8
"""Methods of which the page shows a text."""
MOST_SHOWN = 12_000
"""Tokens that a section writes out; of further methods it has the strip alone."""
MOST_WATCHED = 3
"""Methods of which it shows when tokens left."""


def chosen_maps(run: LoadedRun) -> list[Entry]:
    """Maps of one text: the task most methods share, each at its middle budget."""
    return _of_one_text(run, _evicts)[:MOST_MAPS]


def in_full(tokens: int) -> int:
    """Of how many methods a section writes out a text of so many tokens."""
    return max(1, MOST_SHOWN // max(tokens, 1))


def told_maps(run: LoadedRun) -> list[Entry]:
    """Maps of one text with what the tokens behind it were predicted as."""
    found = _of_one_text(run, lambda entry: entry.get("following") is not None)
    return [entry for entry in found if entry["compression"] != "none"][:MOST_MAPS]


def watched_maps(run: LoadedRun) -> list[Entry]:
    """Maps of one text, the one watched longest, whose methods evict while decoding."""
    spans = [len(e["departures"]["tokens"]) for e in run.maps if e.get("departures")]

    def longest(entry: Entry) -> bool:
        own = entry.get("departures")
        return own is not None and len(own["tokens"]) == max(spans)

    first = _of_one_text(run, longest)
    texts = {(entry["task"], entry["text"]) for entry in first}
    wanted = [e for e in run.maps if (e["task"], e["text"]) in texts]
    return _middle([e for e in wanted if e.get("departures")], run)[:MOST_WATCHED]


def weighed_maps(run: LoadedRun) -> list[Entry]:
    """Maps of one text of which it is known what its tokens are worth."""
    found = _of_one_text(run, lambda entry: entry.get("worth") is not None)
    if not found:
        return []
    text = (found[0]["task"], found[0]["text"])
    own = [entry for entry in run.maps if (entry["task"], entry["text"]) == text]
    return found + _middle([e for e in own if not e.get("worth") and _evicts(e)], run)


def chosen_pairs(
    run: LoadedRun, compare: Sequence[str] | None = None
) -> list[tuple[Entry, Entry]]:
    """Maps of two methods at one text and budget.

    Args:
        run: a run.
        compare: names of the two; None: the first two that the run lists, but for
            `random`, and else one of them and `random`.

    Raises:
        ValueError: not two names, or the run has no such maps.
    """
    known = list(dict.fromkeys(e["compression"] for e in run.maps if _evicts(e)))
    if compare is None:
        listed = sorted(known, key=lambda name: _place(run, name))
        if len(listed) < 2:
            return []
        return _pairs(run, listed[0], listed[1])[:1]
    if len(compare) != 2 or compare[0] == compare[1]:
        raise ValueError(
            f"two different methods are compared; got {shown(list(compare))}. Give two "
            "names, as in snapkv,h2o."
        )
    for name in compare:
        if name not in known:
            raise ValueError(
                f"{run.path} has no map of {shown(name)} that evicts; expected two of "
                f"{shown(sorted(known))}.{nearest(name, known)}"
            )
    found = _pairs(run, *compare)
    if not found:
        raise ValueError(
            f"{run.path} has no maps of {compare[0]!r} and {compare[1]!r} on one text "
            "at one budget. Evaluate both at the same `keeps`."
        )
    return found[:1]


def _pairs(run: LoadedRun, one: str, other: str) -> list[tuple[Entry, Entry]]:
    """All pairs of the two, that of the page's text and a middle budget first."""
    by_key: dict[tuple, dict[str, Entry]] = {}
    for entry in filter(_evicts, run.maps):
        key = (entry["task"], entry["text"], entry.get("keep"))
        by_key.setdefault(key, {})[entry["compression"]] = entry
    found = [(e[one], e[other]) for e in by_key.values() if one in e and other in e]
    if not found:
        return []
    ranks = _ranks(run)
    first = min(found, key=lambda pair: ranks(pair[0]["task"]))[0]
    same = [p for p in found if p[0]["text"] == first["text"]]
    same.sort(key=lambda pair: pair[0].get("keep") or 1.0)
    middle = same[len(same) // 2]
    return [middle, *(pair for pair in found if pair is not middle)]


def _of_one_text(run: LoadedRun, wanted: Callable[[Entry], bool]) -> list[Entry]:
    """Of the text that most entries show, of the task that comes first."""
    by_text: dict[tuple[str, str], list[Entry]] = {}
    for entry in run.maps:
        if wanted(entry) and len(pieces_of(entry)) <= MOST_TOKENS:
            by_text.setdefault((entry["task"], entry["text"]), []).append(entry)
    if not by_text:
        return []
    ranks = _ranks(run)
    best = max(by_text, key=lambda key: (len(by_text[key]), -ranks(key[0])))
    return _middle(by_text[best], run)


def _middle(entries: Sequence[Entry], run: LoadedRun) -> list[Entry]:
    """Of each method one entry, methods as the run lists them, `random` last."""
    out = []
    for own in group(entries, "compression").values():
        ranked = sorted(own, key=lambda entry: entry.get("keep") or 1.0)
        out.append(ranked[len(ranked) // 2])
    return sorted(out, key=lambda entry: _place(run, entry["compression"]))


def _place(run: LoadedRun, name: str) -> tuple[bool, int, str]:
    config = run.about.get("config", {})
    listed = config.get("compressions") if isinstance(config, Mapping) else None
    names = [str(one) for one in listed] if isinstance(listed, list) else []
    return (name == "random", names.index(name) if name in names else len(names), name)


def _evicts(entry: Entry) -> bool:
    """Whether some head misses a token."""
    count = len(pieces_of(entry))
    return any(len(head) < count for layer in entry["kept"] for head in layer)


def _ranks(run: LoadedRun) -> Callable[[str], int]:
    """Tasks that the configuration names first come before others."""
    tasks = run.about.get("config", {}).get("tasks", ())
    named = [t.get("label") or t["name"] for t in tasks if isinstance(t, Mapping)]
    order = dict.fromkeys([*named, *(row["task"] for row in (*run.rows, *run.maps))])
    places = {name: place for place, name in enumerate(order)}
    return lambda task: places[task]
