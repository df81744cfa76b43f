"""What to say where doubles meet a module of floats: the usual cause, and both ways out."""

from __future__ import annotations

import re

__all__ = ["add_doubles"]

_NOTE = (
    "[loopwright] floats of NumPy and Python are float64, weights as a rule float32: give the data as "
    "array.astype('float32') or tensor.float(), or train in doubles with Trainer(precision='fp64')"
)


def add_doubles(error: BaseException) -> None:
    """Where torch refuses to mix float32 and float64, note on ``error``, once, what to do about it.

    >>> error = RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")
    >>> add_doubles(error)
    >>> error.__notes__[0][:46]
    '[loopwright] floats of NumPy and Python are fl'
    """
    words = set(re.findall(r"\w+", str(error).lower())) if isinstance(error, RuntimeError) else set()
    if {"double", "float"} <= words and _NOTE not in getattr(error, "__notes__", ()):
        error.add_note(_NOTE)
