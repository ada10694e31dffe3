"""Scores of pages for queries, from what summarises each page."""

from kvjax.pallas_kernels.page_score.api import page_score as page_score
