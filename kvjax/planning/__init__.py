"""Does it fit? What a model, a context and a compression need of a chip's memory."""

from kvjax.planning.api import plan as plan
from kvjax.planning.record import Layers as Layers
from kvjax.planning.record import Plan as Plan
from kvjax.planning.record import Row as Row
