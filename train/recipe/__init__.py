"""What a YAML file says of a run: frozen dataclasses, decoded strictly."""

from kvjax.train.recipe.chunks import ChunksConfig as ChunksConfig
from kvjax.train.recipe.config import TrainConfig as TrainConfig
from kvjax.train.recipe.data import DataConfig as DataConfig
from kvjax.train.recipe.data import Source as Source
from kvjax.train.recipe.data import Stage as Stage
from kvjax.train.recipe.files import as_tree as as_tree
from kvjax.train.recipe.files import bundled_recipes as bundled_recipes
from kvjax.train.recipe.files import load_config as load_config
from kvjax.train.recipe.learned import DMSConfig as DMSConfig
from kvjax.train.recipe.learned import DuoConfig as DuoConfig
from kvjax.train.recipe.learned import LoRAConfig as LoRAConfig
from kvjax.train.recipe.learned import SurrogateConfig as SurrogateConfig
from kvjax.train.recipe.mesh import MeshConfig as MeshConfig
from kvjax.train.recipe.objective import ObjectiveConfig as ObjectiveConfig
from kvjax.train.recipe.optimizer import OptimizerConfig as OptimizerConfig
from kvjax.train.recipe.output import KeepConfig as KeepConfig
from kvjax.train.recipe.output import LogConfig as LogConfig
from kvjax.train.recipe.sampling import CachedConfig as CachedConfig
from kvjax.train.recipe.sampling import CompressionChoice as CompressionChoice
from kvjax.train.recipe.sampling import SamplingConfig as SamplingConfig
