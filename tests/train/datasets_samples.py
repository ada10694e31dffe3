"""Tiny files and tokenizers for the tests of datasets."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from kvjax.train.data import Mixture
from kvjax.train.data.tokenizer import build_tokenizer
from kvjax.train.data.words import CHARACTERS, Words
from kvjax.train.recipe import DataConfig, Source, Stage

STAGES = (Stage(steps=99, lengths={48: 1.0, 64: 1.0}, tokens_per_step=192),)
TEXTS = [f"document {i} " + "abc " * (i % 7) for i in range(12)]

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}.\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}.\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}.\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Ends a chat that is not to go on with a token of its own, as some models do.
ENDED = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}.\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
)
# Writes an answer differently once another message has followed.
FORGETS = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and "
    "loop.last %}(thought){% endif %}{{ m['content'] }}.\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_words(template: str | None = CHATML) -> Words:
    """Characters, with a chat template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template  # type: ignore[assignment]
    return Words(tokenizer, len(tokenizer))


def said(*texts: str) -> list[dict[str, Any]]:
    """A chat of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]


def write_jsonl(path: pathlib.Path, records: list[dict[str, Any]]) -> str:
    """Path of a file with one record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def merging_tokenizer() -> Any:
    """A byte-level tokenizer with a few merges: fewer tokens than characters."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the rain is warm. the road is long. "] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def mixture(*sources: Source, words: Words = CHARACTERS, stages=STAGES, **kwargs):
    """Short rows from these sources, seed 0."""
    return Mixture(DataConfig(sources=sources), stages, 0, words=words, **kwargs)


def same(one, two) -> None:
    """Two trees are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, one, two)
