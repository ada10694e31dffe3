"""Cache state: parts in several layouts, the tail, and how a layer attends."""

from kvjax.cache.merging import AbstractMerge as AbstractMerge
from kvjax.cache.merging import present as present
from kvjax.cache.pages import PageBudget as PageBudget
from kvjax.cache.pages import Pages as Pages
from kvjax.cache.parts import AbstractPart as AbstractPart
from kvjax.cache.parts import Growth as Growth
from kvjax.cache.parts import KeysOnly as KeysOnly
from kvjax.cache.parts import Slots as Slots
from kvjax.cache.provenance import Provenance as Provenance
from kvjax.cache.provenance import Weights as Weights
from kvjax.cache.provenance import text_digest as text_digest
from kvjax.cache.provenance import token_digest as token_digest
from kvjax.cache.ragged import Ragged as Ragged
from kvjax.cache.ranking import AbstractRanking as AbstractRanking
from kvjax.cache.ranking import Memory as Memory
from kvjax.cache.ranking import levelled as levelled
from kvjax.cache.ranking import places as places
from kvjax.cache.shared import Shared as Shared
from kvjax.cache.state import Front as Front
from kvjax.cache.state import KVCache as KVCache
from kvjax.cache.state import LayerCache as LayerCache
from kvjax.cache.tail import Tail as Tail
from kvjax.cache.tail import empty_tail as empty_tail
from kvjax.cache.tracking import Folding as Folding
from kvjax.cache.tracking import Tracking as Tracking
