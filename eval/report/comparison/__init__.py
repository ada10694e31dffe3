"""Pages that compare models: numbers of several evaluations, tables, figures, gaps."""

from kvjax.eval.report.comparison.bound import recency_bounds as recency_bounds
from kvjax.eval.report.comparison.figures import bytes_figure as bytes_figure
from kvjax.eval.report.comparison.figures import kept_figure as kept_figure
from kvjax.eval.report.comparison.gap import Claim as Claim
from kvjax.eval.report.comparison.gap import claims_table as claims_table
from kvjax.eval.report.comparison.gap import costs_table as costs_table
from kvjax.eval.report.comparison.gap import methods_table as methods_table
from kvjax.eval.report.comparison.measured import Measured as Measured
from kvjax.eval.report.comparison.measured import by_model as by_model
from kvjax.eval.report.comparison.measured import conditions as conditions
from kvjax.eval.report.comparison.measured import losses_by_model as losses_by_model
from kvjax.eval.report.comparison.scores import Column as Column
from kvjax.eval.report.comparison.scores import bound_table as bound_table
from kvjax.eval.report.comparison.scores import cells_table as cells_table
from kvjax.eval.report.comparison.scores import columns_at as columns_at
from kvjax.eval.report.comparison.scores import full_column as full_column
from kvjax.eval.report.comparison.scores import full_table as full_table
from kvjax.eval.report.comparison.scores import perplexity_table as perplexity_table
from kvjax.eval.report.comparison.scores import plain_column as plain_column
from kvjax.eval.report.comparison.scores import score_tables as score_tables
from kvjax.eval.report.comparison.store import gather as gather
from kvjax.eval.report.comparison.store import write_numbers as write_numbers
