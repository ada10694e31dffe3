"""Minimum, maximum and mean of the keys of each page."""

from kvjax.pallas_kernels.page_summary.api import PageSummary as PageSummary
from kvjax.pallas_kernels.page_summary.api import page_summary as page_summary
