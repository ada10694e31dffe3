"""Reports: figures and one self-contained page from a run directory.

`kvjax.eval.report.comparison` makes pages of the numbers of several evaluations.
"""

from kvjax.eval.departures import departures as departures
from kvjax.eval.pieces import token_pieces as token_pieces
from kvjax.eval.report.curves import cost_figure as cost_figure
from kvjax.eval.report.curves import score_figure as score_figure
from kvjax.eval.report.leaving import departure_figure as departure_figure
from kvjax.eval.report.leaving import departure_map as departure_map
from kvjax.eval.report.needle import needle_figure as needle_figure
from kvjax.eval.report.pairs import difference_map as difference_map
from kvjax.eval.report.run import LoadedRun as LoadedRun
from kvjax.eval.report.run import load_run as load_run
from kvjax.eval.report.strips import kl_figure as kl_figure
from kvjax.eval.report.strips import kl_map as kl_map
from kvjax.eval.report.token_map import token_map as token_map
from kvjax.eval.report.worth import token_worth as token_worth
from kvjax.eval.report.write import write_report as write_report
