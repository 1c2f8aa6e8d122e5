"""The report of a run or a stack: one HTML file that needs nothing beside it."""

from convcvx.display.figures import comparison_figure as comparison_figure
from convcvx.display.figures import convergence_figure as convergence_figure
from convcvx.display.figures import filters_figure as filters_figure
from convcvx.display.theme import BOUND_COLOUR as BOUND_COLOUR
from convcvx.display.theme import CONVEX_COLOUR as CONVEX_COLOUR
from convcvx.display.theme import TWIN_COLOUR as TWIN_COLOUR
from convcvx.display.theme import png as png
from convcvx.report.of_run import write_report as write_report
from convcvx.report.of_stack import write_stack_report as write_stack_report
