"""Independent NumPy references of the compression methods; see README.md.

They share no code with kvjax and favour clarity: float64, loops, one sequence.
"""

from .base import attention, kept, kept_mask, rotate
from .codecs import int8_per_token, kivi_keys, kivi_values, low_rank_keys, one_bit
from .decoding import H2OTrace, h2o_decode
from .reading import (
    attend,
    attend_decoupled,
    attend_kept,
    page_mask,
    quest_bounds,
    quest_pages,
    streaming_mask,
    vertical_slash_mask,
)
from .retrieving import (
    exact_topk_mask,
    infllm_mask,
    low_rank_after_rope,
    retroinfer_read,
    shadowkv_masks,
)
from .scorers import (
    score_criticalkv,
    score_cur,
    score_expected_attention,
    score_h2o,
    score_keydiff,
    score_knorm,
    score_lagkv,
    score_observed_attention,
    score_snapkv,
    score_streaming_llm,
    score_tova,
)
from .selection import (
    adakv_kept,
    chunkkv_kept,
    chunkkv_paper_kept,
    duo_kept,
    pyramidkv_layer_budgets,
)

__all__ = [
    "H2OTrace",
    "adakv_kept",
    "attend",
    "attend_decoupled",
    "attend_kept",
    "attention",
    "chunkkv_kept",
    "chunkkv_paper_kept",
    "duo_kept",
    "exact_topk_mask",
    "h2o_decode",
    "infllm_mask",
    "int8_per_token",
    "kept",
    "kept_mask",
    "kivi_keys",
    "kivi_values",
    "low_rank_after_rope",
    "low_rank_keys",
    "one_bit",
    "page_mask",
    "pyramidkv_layer_budgets",
    "quest_bounds",
    "quest_pages",
    "retroinfer_read",
    "rotate",
    "score_criticalkv",
    "score_cur",
    "score_expected_attention",
    "score_h2o",
    "score_keydiff",
    "score_knorm",
    "score_lagkv",
    "score_observed_attention",
    "score_snapkv",
    "score_streaming_llm",
    "score_tova",
    "shadowkv_masks",
    "streaming_mask",
    "vertical_slash_mask",
]
