"""The report of a run, or of several: one HTML page that needs no network. ``write`` makes it of run folders."""

from loopwright.report.page import write
from loopwright.report.recorder import Report

__all__ = ["Report", "write"]
