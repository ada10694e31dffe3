"""What a recipe minimises."""

import dataclasses
from typing import Annotated

from kvjax.fields import Amount, Checked, OneOf

NAMES = {"hidden_layers": ("last", "all"), "tokens": ("answers", "behind")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Checked):
    """What is minimised: a weighted sum. What has no weight is not computed.

    The teacher of all but `next_token` is the initial model with a full cache; one pass
    of it, in the same step, serves all of them.

    Attributes:
        next_token: weight of the cross-entropy of the next token.
        distill: weight of the KL divergence from the teacher, on answer tokens.
        distill_context: weight of the same on every fourth token of the contexts. These
            are read before anything is compressed, so the model stays what it was where
            nothing is done to it. With `dms` and `duo`, which act on all tokens, they
            are read under these.
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

    next_token: Amount = 1.0
    distill: Amount = 0.0
    distill_context: Amount = 0.0
    hidden: Amount = 0.0
    attention: Amount = 0.0
    hidden_layers: Annotated[str, OneOf(*NAMES["hidden_layers"])] = "last"
    tokens: Annotated[str, OneOf(*NAMES["tokens"])] = "answers"

    @property
    def needs_teacher(self) -> bool:
        """Whether a term follows the initial model."""
        return self.compares_logits or bool(self.hidden or self.attention)

    @property
    def compares_logits(self) -> bool:
        """Whether a term follows the initial model's logits."""
        return bool(self.distill or self.distill_context)
