"""kvjax: research on the KV cache of long-context language models, in JAX.

model, tokenizer = kvjax.load("path/to/checkpoint")
c = kvjax.compression("snapkv", **{"evict.budget.keep": 0.25})
out = kvjax.generate(model, tokens, lengths, c, max_new_tokens=64)
"""

from kvjax.cache import KVCache as KVCache
from kvjax.compress import Compression as Compression
from kvjax.compress import Eviction as Eviction
from kvjax.compress import Storage as Storage
from kvjax.compress import compression as compression
from kvjax.compress import compressions as compressions
from kvjax.models.caches import load_cache as load_cache
from kvjax.models.calibration import calibrate as calibrate
from kvjax.models.generation import Generation as Generation
from kvjax.models.generation import generate as generate
from kvjax.models.generation import generate_from as generate_from
from kvjax.models.inference import extend as extend
from kvjax.models.inference import prefill as prefill
from kvjax.models.io import load as load
from kvjax.models.io import save as save
from kvjax.models.prefixes import PrefixStore as PrefixStore
from kvjax.models.simulate import simulate as simulate
from kvjax.models.slopes import gate_slopes as gate_slopes
from kvjax.planning import plan as plan

__version__ = "0.1.0"
