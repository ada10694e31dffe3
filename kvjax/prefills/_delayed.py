"""What a model gives up itself is seen for a while."""

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp
from jaxtyping import Array

from kvjax.attention import self_attention
from kvjax.config import sized
from kvjax.fields import Size
from kvjax.prefills.base import AbstractPrefill


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Delayed(AbstractPrefill):
    """Tokens that the model gives up are seen for `window` more tokens only.

    Attributes:
        window: how long; a token at `j` with a negative retention is seen by the
            queries before `j + window`. 1 is immediate eviction: by itself alone.

    Source: DMS (2506.05345) section 3, delayed eviction. Deviations: masks; dropped
    tokens are still multiplied here, and leave memory with the prompt's end.
    """

    window: Size = sized(16, short=8, recent=True)
    needs_retention: ClassVar[bool] = True

    def attend(self, inputs, lengths, mass, past=None):
        del lengths
        assert inputs.retention is not None  # checked before any compute
        spec = inputs.spec
        stays = jnp.repeat(inputs.retention >= 0, spec.groups, axis=1)[:, :, None]

        def allowed(q_positions: Array, k_positions: Array) -> Array:
            distance = q_positions[:, :, None] - k_positions[:, None, :]
            near = stays[..., : k_positions.shape[1]]
            return near | (distance < self.window)[:, None]

        return self_attention(inputs, allowed=allowed, mass=mass, past=past)
