"""What an evaluation reads beside its configuration, by digests: see `kvjax.inputs`."""

import pathlib
import re

from kvjax import inputs
from kvjax.compress.presets import canonical, compression
from kvjax.eval.asking import files_of
from kvjax.eval.config import TEXT
from kvjax.eval.methods import NONE, RANDOM
from kvjax.eval.plan import EvalPlan
from kvjax.inputs import Inputs
from kvjax.places import expanded

_WORDS = re.compile(r".*(token|vocab|merges|spiece|sentencepiece).*|.*\.model")
"""Names of a tokenizer's files."""


def inputs_of(
    made: EvalPlan, checkpoint: dict[str, pathlib.Path], known: Inputs
) -> Inputs:
    """Digests of compressions, texts, the tokenizer, and of all that is asked.

    A compression counts by what it means: comments in its file do not. Prompts are
    compared as tokens, so that another tokenizer is seen where it has no files.

    Args:
        made: the evaluation.
        checkpoint: files of the model by name; none where it has no directory.
        known: what an earlier call found; files that it stamped are not read again.

    Raises:
        ValueError: a file cannot be read.
    """
    found: Inputs = {}
    for name in dict.fromkeys((NONE, RANDOM, *made.config.compressions)):
        meaning = canonical(compression(name))
        found[f"compression {name!r}"] = inputs.of_text(name, meaning)
    for entry in made.config.tasks:
        label = f"task {entry.title!r}"
        if entry.name == TEXT:
            path = str(entry.fields["path"])
            files = {path: expanded(path)}
        else:
            files = files_of(entry)
        if files:
            found[label] = inputs.of_files(files, known.get(label, {}))
    words = {
        name: file for name, file in checkpoint.items() if _WORDS.fullmatch(file.name)
    }
    if words:
        label = f"tokenizer of {made.config.model!r}"
        found[label] = inputs.of_files(words, known.get(label, {}))
    what = "what is asked (another tokenizer, or another version of kvjax)"
    return found | {"prompts": {what: "-".join(group.source for group in made.groups)}}
