"""What is learnt beside the weights of a model: parts of a recipe."""

import dataclasses
from typing import Annotated

from kvjax.fields import Amount, Checked, Count, Positive, PositiveReal, Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMSConfig(Checked):
    """Training a model to say which tokens it can do without.

    Attributes:
        window: queries that still see an evicted token, its own first. 1 is immediate
            eviction: it sees itself and nothing else ever does.
        ratio: compression ratio that is asked for in the end, above 1.
        ramp: steps over which it rises from 1.
        temperature: of the relaxed decisions.
        weight: of the term that asks for the ratio.

    Source: DMS (2506.05345) section 3: Gumbel-sigmoid decisions, one-sided term, ratio
    raised linearly (100 steps per unit).
    """

    window: Positive = 16
    ratio: Annotated[float, Range(above=1)] = 4.0
    ramp: Count = 300
    temperature: PositiveReal = 0.3
    weight: Amount = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurrogateConfig(Checked):
    """Training an evictor's head to predict what later queries look at.

    Attributes:
        weight: of the squared error of log scores.
    """

    weight: Amount = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuoConfig(Checked):
    """Training gates that tell retrieval heads from streaming heads.

    Attributes:
        sink: first tokens that a streaming head sees.
        recent: newest tokens that it sees, the query's own among them.
        weight: of the mean gate in the loss.

    Source: DuoAttention (2410.10819) section 2.2: weight 0.05; 128 sinks and 256 recent
    tokens, for contexts of 1,000 to 32,000.
    """

    sink: Count = 4
    recent: Positive = 32
    weight: Amount = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Checked):
    """Low-rank updates beside frozen matrices.

    Attributes:
        rank: of an update.
        alpha: updates are scaled by `alpha / rank`.
        modules: matrices of each layer, of q, k, v, o, gate, up, down.
    """

    rank: Annotated[int, Range(1, 2**16)] = 16
    alpha: PositiveReal = 32.0
    modules: tuple[str, ...] = ("q", "k", "v", "o")

    def __post_init__(self):
        super().__post_init__()
        if not self.modules:
            raise ValueError(
                "`lora.modules` must list at least one matrix, as in [q, k, v, o]; got "
                "none."
            )
