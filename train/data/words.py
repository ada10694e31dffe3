"""Between text and the tokens of the model that is trained."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.eval.framing import Framing, framing
from kvjax.eval.tasks import TRAIN, Task, stream
from kvjax.eval.text import Tokenizer
from kvjax.models.adapters import read_tokenizer, tokenizer_directory
from kvjax.models.bundled import model_directory
from kvjax.models.hub import checkpoint_directory
from kvjax.models.io import load_config
from kvjax.models.tokenizer import has_tokenizer, save_tokenizer
from kvjax.plaintext import check_text
from kvjax.train.data import tokenizer as characters
from kvjax.train.recipe import TrainConfig

SAMPLE = 2000
"""Characters from which the length of a task's tokens is estimated."""


class Words:
    """A Hugging Face tokenizer as training uses it.

    Args:
        tokenizer: of the model that training starts from.
        vocab_size: tokens that the model knows.

    Attributes:
        begin, end: tokens before and behind a document: `<bos>` where the tokenizer
            itself puts one before a text, `<eos>` where it has one.
        pad: a valid token for where there is no text.

    Raises:
        ValueError: one of these is a token that the model does not know.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.begin = tuple(Tokenizer(tokenizer, vocab_size).prefix)
        end = tokenizer.eos_token_id
        self.end: tuple[int, ...] = () if end is None else (end,)
        pad = int(tokenizer.pad_token_id or 0)
        self.pad = pad if pad < vocab_size else 0  # added, and the model was not
        for token in (*self.begin, *self.end):
            self._check(token)

    def encode(self, text: str, *, going_on: bool = False) -> np.ndarray:
        """Token ids of a text, int32, without specials.

        Args:
            text: what is read.
            going_on: whether it stands behind another.

        Raises:
            ValueError: the tokenizer has tokens that the model does not know, or the
                text has characters that are none.
        """
        check_text(text, "the text")
        read = Tokenizer(self.tokenizer, self.vocab_size)
        tokens = read.going_on(text) if going_on else read.encode(text)
        found = np.asarray(tokens, np.int32)
        if found.size and found.max() >= self.vocab_size:
            self._check(int(found.max()))
        return found

    def unknown(self, tokens: np.ndarray) -> int:
        """How many of the tokens stand for text that the tokenizer does not know."""
        stands = self.tokenizer.unk_token_id
        if stands is None or stands in (*self.begin, *self.end):
            return 0  # of the kind that knows every byte
        return int(np.sum(tokens == stands))

    def _check(self, token: int) -> None:
        if token >= self.vocab_size:
            piece = self.tokenizer.convert_ids_to_tokens(token)
            raise ValueError(
                f"the tokenizer gives token {token} ({piece!r}), the model knows "
                f"{self.vocab_size} (`vocab_size`). Use the tokenizer that belongs to "
                "the model."
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; specials are dropped."""
        return Tokenizer(self.tokenizer, self.vocab_size).decode(tokens)

    @functools.cache  # noqa: B019 - lives as long as one run
    def stops(self, stop: str) -> tuple[int, ...]:
        """Every token whose text holds `stop`; without one, that ends documents."""
        if not stop:
            return self.end
        return Tokenizer(self.tokenizer, self.vocab_size).stops(stop)

    @functools.cache  # noqa: B019
    def density(self, task: Task) -> float:
        """Characters per token in the text of a task, from a sample.

        Raises:
            ValueError: the task uses characters that the model has no token for.
        """
        episode = task.episode(stream(TRAIN, "density", 0, 0), SAMPLE)
        turn = episode.turns[0]
        text = episode.context + turn.question + turn.answer
        tokenizer = Tokenizer(self.tokenizer, self.vocab_size)
        tokenizer.check(f"task {task.name!r}", [text])
        return len(text) / len(self.encode(text))

    def frame(self, task: Task) -> Framing:
        """How the task is put to the model, as in an evaluation."""
        return framing(Tokenizer(self.tokenizer, self.vocab_size), task)

    def save(self, directory: pathlib.Path, max_positions: int) -> None:
        """The tokenizer's files beside the weights of a model."""
        del max_positions  # in the tokenizer's own configuration
        save_tokenizer(self.tokenizer, directory)


class Characters(Words):
    """The tokenizer of kvjax-tiny: fast on ASCII, a character a token."""

    def __init__(self):
        self.vocab_size = len(characters.VOCABULARY)
        self.begin, self.end = (characters.BOS,), (characters.EOS,)
        self.pad = characters.PAD

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The same as a Hugging Face tokenizer, built when it is first needed."""
        return characters.build_tokenizer()

    def encode(self, text: str, *, going_on: bool = False) -> np.ndarray:
        if text.isascii():
            return characters.encode(text)
        return super().encode(text, going_on=going_on)

    def decode(self, tokens: Sequence[int]) -> str:
        return characters.decode(tokens)

    def stops(self, stop: str) -> tuple[int, ...]:
        return tuple(map(int, characters.encode(stop))) if stop else self.end

    def density(self, task: Task) -> float:
        del task
        return 1.0

    def frame(self, task: Task) -> Framing:
        if task.chat:
            return super().frame(task)
        # Without the tokenizer, which takes a while to be built.
        return Framing(tokenizer=None, begin=self.begin)  # type: ignore[arg-type]

    def save(self, directory: pathlib.Path, max_positions: int) -> None:
        characters.save_tokenizer(directory, max_positions)


CHARACTERS = Characters()


def words_of(config: TrainConfig) -> Words:
    """The words of the model that training starts from.

    Fresh weights read characters. So does a checkpoint without a tokenizer that has as
    many tokens as there are characters: a character model saved by its weights alone.

    Raises:
        ValueError: the checkpoint has no tokenizer, or one that cannot be read; a model
            of characters has fewer tokens than there are.
    """
    if config.model is not None:
        _check_characters(config.model.vocab_size)
        return CHARACTERS
    found = checkpoint_directory(model_directory(config.init))
    vocab_size, directory = load_config(found).vocab_size, tokenizer_directory(found)
    if vocab_size == CHARACTERS.vocab_size and not has_tokenizer(directory):
        return CHARACTERS
    tokenizer = read_tokenizer(directory)
    if tokenizer.get_vocab() != characters.VOCABULARY:
        return Words(tokenizer, vocab_size)
    _check_characters(vocab_size)
    # A template is saved again, and writes special tokens, of which `Characters`
    # knows nothing.
    return Words(tokenizer, vocab_size) if tokenizer.chat_template else CHARACTERS


def _check_characters(vocab_size: int) -> None:
    """A model of `vocab_size` tokens has one for each character."""
    if vocab_size < CHARACTERS.vocab_size:
        without = [t for t, i in characters.VOCABULARY.items() if i >= vocab_size]
        raise ValueError(
            f"the model knows {vocab_size} tokens (`vocab_size`) and reads characters, "
            f"of which there are {CHARACTERS.vocab_size}: it has no token for "
            f"{''.join(without)!r}. Give it `vocab_size: {CHARACTERS.vocab_size}`."
        )
