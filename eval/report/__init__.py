"""Reports: figures and one self-contained page from a run directory.

`kvjax.eval.report.comparison` makes pages of the numbers of several evaluations.
"""

from kvjax.eval.report.curves import cost_figure as cost_figure
from kvjax.eval.report.curves import score_figure as score_figure
from kvjax.eval.report.needle import needle_figure as needle_figure
from kvjax.eval.report.run import LoadedRun as LoadedRun
from kvjax.eval.report.run import load_run as load_run
from kvjax.eval.report.token_map import token_map as token_map
from kvjax.eval.report.write import write_report as write_report
