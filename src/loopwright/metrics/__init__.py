"""Metrics: a base to write one in a few lines, a few fast ones, and room for every torchmetrics metric.

A metric is any object with ``update(*inputs)``, ``compute()`` and ``reset()``. ``functional`` has the same numbers for
a single batch.
"""

from loopwright.metrics import functional
from loopwright.metrics.accuracy import Accuracy
from loopwright.metrics.averages import MAE, MSE, Mean
from loopwright.metrics.base import Metric
from loopwright.metrics.check import check_metrics, fresh
from loopwright.metrics.collect import Meters
from loopwright.metrics.select import On

__all__ = ["MAE", "MSE", "Accuracy", "Mean", "Meters", "Metric", "On", "check_metrics", "fresh", "functional"]
