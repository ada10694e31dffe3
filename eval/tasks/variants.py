"""One task under several names, each with defaults of its own."""

import dataclasses
from typing import Any

from kvjax.eval.tasks.base import Task
from kvjax.fields import hints_of


def variant(base: type[Task], name: str, **defaults: Any) -> type[Task]:
    """The task `base` as it is registered under `name`: with other defaults.

    Its random numbers are its own, for they are drawn by name. `multi_turn` may be
    given too.
    """
    hints = hints_of(base)
    space = {"name": name, "__doc__": base.__doc__, "__module__": base.__module__}
    if "multi_turn" in defaults:
        space["multi_turn"] = defaults.pop("multi_turn")
    made = dataclasses.make_dataclass(
        "".join(part.title() for part in name.split("_")),
        [
            (key, hints[key], dataclasses.field(default=v))
            for key, v in defaults.items()
        ],
        bases=(base,),
        namespace=space,
        frozen=True,
        kw_only=True,
    )
    made(**{})  # its defaults are within their ranges
    return made
