"""The report of a run, or of several: one HTML page that needs no network. ``write`` makes it of run folders.

``results`` shows single samples with what a model says of them.
"""

from loopwright.report.page import write
from loopwright.report.recorder import Report
from loopwright.report.results import Results, results

__all__ = ["Report", "Results", "results", "write"]
