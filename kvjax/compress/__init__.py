"""`Compression` and what it does to one layer."""

from kvjax.compress.config import Compression as Compression
from kvjax.compress.config import Eviction as Eviction
from kvjax.compress.config import Storage as Storage
from kvjax.compress.presets import compression as compression
from kvjax.compress.presets import compressions as compressions
