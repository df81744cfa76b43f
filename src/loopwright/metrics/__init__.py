"""Metrics: fast ones, arithmetic on them, a base to write one, and room for all of torchmetrics and scikit-learn.

A metric is any object with ``update(*inputs)``, ``compute()`` and ``reset()``, a function of predictions and targets,
or a name such as ``"torchmetrics:auroc"``. ``functional`` has the same numbers for a single batch.
"""

from loopwright.metrics import functional
from loopwright.metrics.accuracy import Accuracy
from loopwright.metrics.algebra import Derived
from loopwright.metrics.averages import Max, Mean, Min, Sum
from loopwright.metrics.base import Metric
from loopwright.metrics.check import check_metrics, fresh, keys_of
from loopwright.metrics.collect import Meters
from loopwright.metrics.confusion import ConfusionMatrix
from loopwright.metrics.function import Function
from loopwright.metrics.modes import Grouped, Running, Where, Window
from loopwright.metrics.perplexity import Perplexity
from loopwright.metrics.rates import F1, Dice, FBeta, IoU, Precision, Rate, Recall, Specificity
from loopwright.metrics.regression import MAE, MSE, R2, RMSE
from loopwright.metrics.select import On, renamed

__all__ = [
    "F1", "MAE", "MSE", "R2", "RMSE", "Accuracy", "ConfusionMatrix", "Derived", "Dice", "FBeta", "Function",
    "Grouped", "IoU", "Max", "Mean", "Meters", "Metric", "Min", "On", "Perplexity", "Precision", "Rate", "Recall",
    "Running", "Specificity", "Sum", "Where", "Window", "check_metrics", "fresh", "functional", "keys_of", "renamed",
]  # fmt: skip
