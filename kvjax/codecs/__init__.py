"""How keys and values are held: plain, quantised, low rank, projected, pruned."""

from collections.abc import Mapping
from types import MappingProxyType

from kvjax.codecs._affine import Affine as Affine
from kvjax.codecs._affine import AffineArray as AffineArray
from kvjax.codecs._hadamard import Hadamard as Hadamard
from kvjax.codecs._hadamard import HadamardArray as HadamardArray
from kvjax.codecs._lloyd_max import LloydMax as LloydMax
from kvjax.codecs._lloyd_max import LloydMaxArray as LloydMaxArray
from kvjax.codecs._low_rank import LowRank as LowRank
from kvjax.codecs._low_rank import LowRankArray as LowRankArray
from kvjax.codecs._plain import Plain as Plain
from kvjax.codecs._plain import PlainArray as PlainArray
from kvjax.codecs._projected import Projected as Projected
from kvjax.codecs._projected import ProjectedArray as ProjectedArray
from kvjax.codecs._think import ThinK as ThinK
from kvjax.codecs._think import ThinkArray as ThinkArray
from kvjax.codecs.base import AbstractCodec as AbstractCodec
from kvjax.codecs.base import AbstractEncoded as AbstractEncoded
from kvjax.codecs.base import Side as Side
from kvjax.codecs.base import straight_through as straight_through
from kvjax.codecs.on_host import OnHost as OnHost

CODECS: Mapping[str, type[AbstractCodec]] = MappingProxyType(
    {
        "plain": Plain,
        "affine": Affine,
        "hadamard": Hadamard,
        "lloyd_max": LloydMax,
        "low_rank": LowRank,
        "projected": Projected,
        "think": ThinK,
    }
)
