"""The metadata of a GGUF file, asked by name, type and range."""

from typing import Any

from kvjax.fields import Positive, fit
from kvjax.messages import nearest, shown
from kvjax.models.gguf.header import Header
from kvjax.models.gguf.names import LAYERS
from kvjax.models.gguf.walk import Array

_NONE: Any = object()
_MOST_LAYERS = 10_000
NO_TOKEN = 2**32 - 1
"""What some writers say of a token that there is not."""


class Metadata:
    """The metadata of a file, by its architecture.

    Raises:
        ValueError: the architecture is missing or not read.
    """

    def __init__(self, header: Header):
        self.header = header
        name = self.get("general.architecture", str)
        if name not in LAYERS:
            raise ValueError(
                f"{header.path} has the architecture {shown(name)}, which is not read; "
                f"expected one of {sorted(LAYERS)}.{nearest(name, LAYERS)}"
            )
        self.architecture = name

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.own("attention.head_count", Positive)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.own("attention.head_count_kv", Positive, self.heads)

    def get(self, name: str, hint: Any, default: Any = _NONE) -> Any:
        """A setting by its whole name, as `hint` has it.

        Raises:
            ValueError: another type or out of range; missing without a `default`.
        """
        known = self.header.metadata
        if name not in known:
            if default is not _NONE:
                return default
            raise ValueError(
                f"{self.header.path} lacks the setting `{name}`."
                f"{nearest(name, known)} Convert it again with a current llama.cpp."
            )
        value = known[name]
        if isinstance(value, Array):
            value = self._same(name)
        try:
            return fit(value, hint, name)
        except ValueError as wrong:
            raise ValueError(f"{self.header.path}: {wrong}") from None

    def own(self, name: str, hint: Any, default: Any = _NONE) -> Any:
        """A setting of the architecture, whose name is in front of it."""
        return self.get(f"{self.architecture}.{name}", hint, default)

    def _same(self, name: str) -> Any:
        """What all entries of an array are: some files say it layer by layer."""
        found = self.by_layer(name)
        if not found or any(one != found[0] for one in found):
            raise ValueError(
                f"{self.header.path}: `{name}` is an array of {len(found)} entries, "
                f"{shown(found)}; expected one value, the same for all layers."
            )
        return found[0]

    def by_layer(self, name: str) -> list[Any]:
        """An array with an entry for each layer.

        Raises:
            ValueError: it has more than any model has layers.
        """
        array = self.header.metadata.get(name)
        if isinstance(array, Array) and array.count > _MOST_LAYERS:
            raise ValueError(
                f"{self.header.path}: `{name}` has {array.count} entries; expected one "
                "value, or one for each layer."
            )
        return self.header.items(name)

    def token(self, kind: str, vocab: int) -> int | None:
        """The id of a special token, or None.

        Raises:
            ValueError: it is no id of the vocabulary.
        """
        name = f"tokenizer.ggml.{kind}_token_id"
        found = self.get(name, Any, None)
        if found is None or found in (NO_TOKEN, -1):
            return None
        if type(found) is not int or not 0 <= found < vocab:
            raise ValueError(
                f"{self.header.path}: `{name}` is {shown(found)}, which is no id of "
                f"the vocabulary of {vocab}."
            )
        return found
