"""Every token sees all before it."""

import dataclasses
from typing import ClassVar, final

from kvjax.attention import self_attention
from kvjax.prefills.base import AbstractPrefill


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(AbstractPrefill):
    """Full causal attention."""

    causal: ClassVar[bool] = True

    def attend(self, inputs, lengths, mass, past=None):
        del lengths
        return self_attention(inputs, mass=mass, past=past)
