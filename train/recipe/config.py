"""All that a recipe says of one run."""

import dataclasses
from typing import Annotated

from kvjax.fields import Checked, Count, OneOf, Positive, Seed
from kvjax.models.config import DecoderConfig, Evictor, Projection
from kvjax.train.recipe.chunks import ChunksConfig
from kvjax.train.recipe.data import DataConfig, Stage
from kvjax.train.recipe.learned import (
    DMSConfig,
    DuoConfig,
    LoRAConfig,
    SurrogateConfig,
)
from kvjax.train.recipe.mesh import MeshConfig
from kvjax.train.recipe.objective import ObjectiveConfig
from kvjax.train.recipe.optimizer import OptimizerConfig
from kvjax.train.recipe.output import KeepConfig, LogConfig
from kvjax.train.recipe.sampling import CachedConfig, SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """One run.

    Attributes:
        seed: of the weights and of the data.
        model: what is trained from fresh weights; or
        init: the checkpoint, or bundled model, that training goes on from.
        data: what it is trained on.
        stages: row widths over time; their steps add up to the run's.
        sampling: the compressions that are simulated.
        chunks: rows are read in chunks, and what is held is compressed behind each
            instead of once; None: all tokens of a row together.
        objective: what is minimised.
        evictor: what the model gets to say which tokens it can do without.
        dms: how it is trained to use it, instead of `sampling`; or
        surrogate: how its head is; or
        duo: how gates of its heads are, and nothing else of it.
        projection: bases of keys and values that the model gets, principal components
            of the first batch; they are trained, and what `trainable` names.
        trainable: names of the weights that are trained, as shell patterns
            (`*.attention.k.kernel`, `*norm.weight`); none: all.
        lora: low-rank updates; they are trained, and what `trainable` names.
        remat: recompute layers in the backward pass: less memory, a third more work.
        loop_layers: compile layers that compute the same once: minutes instead of an
            hour for a deep model.
        compute: dtype of the passes; the weights that are trained stay in float32.
        mesh: devices, and what they split; one unless it says more.
        optimizer: how.
        log_every, eval_every, save_every: in steps.
        eval_items: held-out items per source and width of the running evaluation.
        cached: what that evaluation decodes through the real cache.
        keep: which checkpoints stay.
        log: where numbers go.
        resume: the checkpoint's step to go back to; None: the newest.
    """

    seed: Seed = 0
    model: DecoderConfig | None = None
    init: str = ""
    data: DataConfig
    stages: tuple[Stage, ...]
    sampling: SamplingConfig = SamplingConfig()
    chunks: ChunksConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    evictor: Evictor | None = None
    dms: DMSConfig | None = None
    surrogate: SurrogateConfig | None = None
    projection: Projection | None = None
    duo: DuoConfig | None = None
    trainable: tuple[str, ...] = ()
    lora: LoRAConfig | None = None
    remat: bool = False
    loop_layers: bool = False
    compute: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    log_every: Positive = 10
    eval_every: Positive = 100
    save_every: Positive = 100
    eval_items: Positive = 32
    cached: CachedConfig = CachedConfig()
    keep: KeepConfig = KeepConfig()
    log: LogConfig = LogConfig()
    resume: Count | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.model is None) == (not self.init):
            raise ValueError(
                "a recipe needs either `model` (fresh weights) or `init` (a checkpoint "
                f"to go on from); got {'neither' if self.model is None else 'both'}."
            )
        ways = {
            "dms": self.dms,
            "surrogate": self.surrogate,
            "duo": self.duo,
            "sampling.choices": self.sampling.choices,
        }
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} exclude each other: each says what attention "
                "sees."
            )
        if (self.dms or self.surrogate) and self.evictor is None:
            raise ValueError(
                f"`{given[0]}` needs an `evictor`; add `evictor: {{kind: ...}}`."
            )
        if self.projection is not None and not self.sampling.choices:
            raise ValueError(
                "`projection` is trained by cutting keys and values short; got no "
                "`sampling.choices`. Add `{compression: matryoshka, keeps: [...]}`."
            )
        others = {
            "trainable": self.trainable,
            "lora": self.lora,
            "evictor": self.evictor,
            "projection": self.projection,
        }
        if self.duo and any(others.values()):
            names = " and ".join(f"`{name}`" for name in others if others[name])
            raise ValueError(
                f"`duo` trains gates on a model that stays as it is; got {names} too. "
                "Leave it out, or train in two runs."
            )
        if self.chunks is not None:
            self._check_chunks()
        if not self.stages:
            raise ValueError(
                "`stages` must list at least one stage; got none. Add "
                "`- {steps: 100, lengths: {256: 1}}`."
            )

    def _check_chunks(self) -> None:
        """Nothing is asked for that needs all tokens of a row together."""
        whole = {
            "dms": self.dms,
            "surrogate": self.surrogate,
            "duo": self.duo,
            "projection": self.projection,
            "objective.distill_context": self.objective.distill_context,
            "objective.hidden": self.objective.hidden,
            "objective.attention": self.objective.attention,
            "sampling.choice_gradient": self.sampling.choice_gradient,
        }
        given = [f"`{name}`" for name, value in whole.items() if value]
        if given:
            raise ValueError(
                f"{' and '.join(given)} need all tokens of a row together; got "
                "`chunks` too. Leave one of them out; `objective.next_token` and "
                "`objective.distill` work in chunks."
            )

    @property
    def only_lora(self) -> bool:
        """Whether the updates of LoRA are all that the run changes."""
        more = self.trainable or self.evictor or self.projection or self.duo
        return self.lora is not None and not more

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Between which values the weights that are trained stay; None: anywhere."""
        return (0.0, 1.0) if self.duo else None

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, step: int) -> int:
        """Number of the stage of a step, steps counted from 1."""
        for number, stage in enumerate(self.stages[:-1]):
            if step <= stage.steps:
                return number
            step -= stage.steps
        return len(self.stages) - 1
