"""The recipe of a run: frozen dataclasses, decoded strictly from YAML."""

import dataclasses
import importlib.resources
import importlib.resources.abc
import pathlib
from collections.abc import Sequence

import yaml

from kvjax.config import decode, override, parse_assignments
from kvjax.models.config import DecoderConfig, Evictor, Projection
from kvjax.train.data_config import DataConfig as DataConfig
from kvjax.train.data_config import Source as Source
from kvjax.train.data_config import Stage as Stage
from kvjax.train.learned_config import (
    DMSConfig,
    DuoConfig,
    LoRAConfig,
    SurrogateConfig,
)
from kvjax.train.mesh_config import MeshConfig as MeshConfig
from kvjax.train.objective_config import ObjectiveConfig as ObjectiveConfig
from kvjax.train.output_config import KeepConfig, LogConfig
from kvjax.train.sampling_config import CachedConfig as CachedConfig
from kvjax.train.sampling_config import Choice as Choice
from kvjax.train.sampling_config import SamplingConfig as SamplingConfig
from kvjax.types import nearest

COMPUTE = ("float32", "bfloat16")
SCHEDULES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and schedule: warm-up, constant, decay to zero.

    Attributes:
        name: `muon` (matrices; AdamW for the rest) or `adamw`.
        learning_rate: of the constant part. Muon's updates are scaled to the size of
            AdamW's, so one rate serves both.
        warmup, decay: steps at the beginning and at the end.
        schedule: shape of the decay, `linear` or `cosine` (half a period).
        weight_decay: decoupled.
        beta1, beta2: moments of AdamW.
        clip: bound on the global gradient norm.
        accumulate: batches per update, whose gradients are averaged.
    """

    name: str = "muon"
    learning_rate: float = 2e-3
    warmup: int = 50
    decay: int = 300
    schedule: str = "linear"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    accumulate: int = 1

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"Unknown `optimizer.schedule` {self.schedule!r}; expected one of "
                f"{list(SCHEDULES)}.{nearest(self.schedule, SCHEDULES)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    Attributes:
        seed: of the weights and of the data.
        model: what is trained from fresh weights; or
        init: the checkpoint, or bundled model, that training goes on from.
        data: what it is trained on.
        stages: row widths over time; their steps add up to the run's.
        sampling: the compressions that are simulated.
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

    seed: int = 0
    model: DecoderConfig | None = None
    init: str = ""
    data: DataConfig
    stages: tuple[Stage, ...]
    sampling: SamplingConfig = SamplingConfig()
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
    compute: str = "float32"
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    eval_items: int = 32
    cached: CachedConfig = CachedConfig()
    keep: KeepConfig = KeepConfig()
    log: LogConfig = LogConfig()
    resume: int | None = None

    def __post_init__(self):
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
        if min(self.log_every, self.eval_every, self.save_every) < 1:
            raise ValueError(
                "`log_every`, `eval_every` and `save_every` must be at least 1; got "
                f"{self.log_every}, {self.eval_every} and {self.save_every}."
            )
        if self.compute not in COMPUTE:
            raise ValueError(
                f"`compute` must be one of {list(COMPUTE)}; got {self.compute!r}."
            )

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


def _folder() -> importlib.resources.abc.Traversable:
    return importlib.resources.files("kvjax") / "configs" / "train"


def bundled_recipes() -> list[str]:
    """Names of `configs/train/`."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir())


def load_config(name: str | pathlib.Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A bundled recipe of `configs/train/` or a YAML file, some fields changed.

    Args:
        name: bundled name, or path to a `.yaml` file.
        overrides: `dotted.path=value`, the value in YAML.

    Raises:
        ValueError: no such recipe, unknown key (the nearest is named) or a value of a
            wrong type.
    """
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"no recipe at {path}.")
        text = path.read_text(encoding="utf-8")
    else:
        known = bundled_recipes()
        if str(name) not in known:
            raise ValueError(
                f"Unknown recipe {str(name)!r}; expected one of {known} or a path to a "
                f".yaml file.{nearest(str(name), known)}"
            )
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as wrong:
        raise ValueError(f"{name} is not YAML: {wrong}") from None
    return decode(override(tree, parse_assignments(overrides)), TrainConfig)
