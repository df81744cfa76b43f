"""A value that is undefined since there was nothing to measure: nan, and told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loopwright.errors import LoopwrightWarning


def is_of_nothing(metric: Any) -> bool:
    """True for a metric whose value is nan and that says, once, that it was given nothing."""
    with pytest.warns(LoopwrightWarning, match="was given no sample"):
        first = float(metric.compute())
    return math.isnan(first) and math.isnan(float(metric.compute()))
