"""What is learnt beside the weights of a model: parts of a recipe."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMSConfig:
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

    window: int = 16
    ratio: float = 4.0
    ramp: int = 300
    temperature: float = 0.3
    weight: float = 5.0

    def __post_init__(self):
        if self.ratio <= 1.0 or self.temperature <= 0.0 or self.window < 1:
            raise ValueError(
                "`ratio` must be above 1, `temperature` positive and `window` at least "
                f"1; got {self.ratio}, {self.temperature} and {self.window}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurrogateConfig:
    """Training an evictor's head to predict what later queries look at.

    Attributes:
        weight: of the squared error of log scores.
    """

    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuoConfig:
    """Training gates that tell retrieval heads from streaming heads.

    Attributes:
        sink: first tokens that a streaming head sees.
        recent: newest tokens that it sees, the query's own among them.
        weight: of the mean gate in the loss.

    Source: DuoAttention (2410.10819) section 2.2: weight 0.05; 128 sinks and 256 recent
    tokens, for contexts of 1,000 to 32,000.
    """

    sink: int = 4
    recent: int = 32
    weight: float = 0.05

    def __post_init__(self):
        if self.sink < 0 or self.recent < 1 or self.weight < 0.0:
            raise ValueError(
                "`sink` and `weight` must not be negative and `recent` at least 1; got "
                f"{self.sink}, {self.weight} and {self.recent}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank updates beside frozen matrices.

    Attributes:
        rank: of an update.
        alpha: updates are scaled by `alpha / rank`.
        modules: matrices of each layer, of q, k, v, o, gate, up, down.
    """

    rank: int = 16
    alpha: float = 32.0
    modules: tuple[str, ...] = ("q", "k", "v", "o")

    def __post_init__(self):
        if self.rank < 1 or not self.modules:
            raise ValueError(
                "`lora` needs a rank of at least 1 and at least one module; got "
                f"{self.rank} and {self.modules}."
            )
