"""What a recipe minimises."""

import dataclasses

from kvjax.types import nearest

NAMES = {"hidden_layers": ("last", "all"), "tokens": ("answers", "behind")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised: a weighted sum. What has no weight is not computed.

    The teacher of `distill`, `hidden` and `attention` is the initial model with a full
    cache; one pass of it, in the same step, serves all three.

    Attributes:
        next_token: weight of the cross-entropy of the next token.
        distill: weight of the KL divergence from the teacher, on answer tokens.
        hidden: weight of the squared error of hidden states, divided by the teacher's
            mean square, averaged over the layers.
        attention: the same of each layer's attention output, before the o projection.
        hidden_layers: `last`: after the final norm alone; `all`: behind every layer.
        tokens: where `hidden` and `attention` are compared. `answers`: where an answer
            token is predicted; `behind`: where any token behind the compression point
            is.

    Source: DuoAttention (2410.10819) section 2.3, the last hidden state at answer
    tokens; TinyBERT (1909.10351) section 3, every layer. Deviations: the teacher's mean
    square divides, so that layers of any scale weigh the same.
    """

    next_token: float = 1.0
    distill: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    hidden_layers: str = "last"
    tokens: str = "answers"

    def __post_init__(self):
        for name, known in NAMES.items():
            given = getattr(self, name)
            if given not in known:
                raise ValueError(
                    f"`objective.{name}` must be one of {list(known)}; got {given!r}."
                    f"{nearest(given, known)}"
                )

    @property
    def needs_teacher(self) -> bool:
        """Whether a term follows the initial model."""
        return bool(self.distill or self.hidden or self.attention)
