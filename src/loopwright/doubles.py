"""What to say where data does not fit its module or loss: the usual cause, and what to type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_doubles", "add_nonfinite"]

_DOUBLES = (
    "floats of NumPy and Python are float64, weights as a rule float32: give the data as "
    "array.astype('float32') or tensor.float(), or train in doubles with Trainer(precision='fp64')"
)
_WHOLE = (
    "whole numbers meet the floats of a module: give pixels from 0 to 255 as images.float() / 255, other numbers as "
    "tensor.float() or array.astype('float32')"
)
_CLASSES = (
    "cross entropy takes classes as int64: y.long(), array.astype('int64') or frame['y'].astype('int64'). For measured "
    "values take nn.MSELoss(), for yes or no nn.BCEWithLogitsLoss() with floats"
)
_COLUMN = (
    "cross entropy takes one class for each sample, of shape [n]: y.squeeze(1) or array[:, 0], and of a data frame the "
    "column itself, frame['y'] in the place of frame[['y']]"
)
_INTEGERS = {"byte", "char", "short", "int", "long", "unsigned"}  # torch's words for dtypes


def add_doubles(error: BaseException) -> None:
    """Where torch refuses dtypes or shapes of data as they usually come, note on ``error``, once, what to do about it.

    >>> error = RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")
    >>> add_doubles(error)
    >>> error.__notes__[0][:46]
    '[loopwright] floats of NumPy and Python are fl'
    """
    note = _of_dtypes(str(error)) if isinstance(error, RuntimeError) else _of_keywords(error)
    if note is not None and f"[loopwright] {note}" not in getattr(error, "__notes__", ()):
        error.add_note(f"[loopwright] {note}")


def _of_dtypes(text: str) -> str | None:
    words = set(re.findall(r"\w+", text.lower()))
    if "multi-target not supported" in text:
        return _COLUMN
    if "target dtype to be Long" in text or "expected scalar type Long" in text:
        return _CLASSES
    if {"double", "float"} <= words:
        return _DOUBLES
    return _WHOLE if "same" in words and "float" in words and words & _INTEGERS else None


def _of_keywords(error: BaseException) -> str | None:
    """Of a module that ``Supervised`` called with the names in a batch, which it does not take."""
    trace, found = error.__traceback__ if isinstance(error, TypeError) else None, None
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "_any_step" and frame.f_globals.get("__name__") == "loopwright.task":
            found = frame.f_locals
        trace = trace.tb_next
    if found is None or not found.get("kwargs") or "argument" not in str(error):
        return None
    keys = list(found["batch"]) if isinstance(found["batch"], Mapping) else list(found["kwargs"])
    x, y = repr(keys[0]), repr(keys[-1]) if len(keys) > 1 else "..."
    return (
        f"the module was called with the names {', '.join(map(repr, found['kwargs']))}, as a dict of arrays gives "
        f"them. Say which is the input and which the target: Supervised(..., inputs={x}, targets={y}); inputs={x} is "
        f"passed by position, inputs=[{x}] by its name"
    )


def add_nonfinite(error: BaseException, batches: Iterable[Any]) -> None:
    """Note on ``error``, about a loss that is not finite, which parts of its batches are not finite themselves.

    >>> error = ArithmeticError("loss of nan")
    >>> add_nonfinite(error, [(torch.tensor([[1.0, torch.nan]]), torch.tensor([0]))])
    >>> print(error.__notes__[0])
    [loopwright] the batch itself holds 1 value that is not finite in batch[0], the first at [0, 1]: mend the data,
    lw.data.summary(data) counts them, or fill in what is missing, such as by torch.nan_to_num
    """
    told = [one for batch in batches for one in _not_finite(batch, "batch")]
    if told:
        error.add_note(
            f"[loopwright] the batch itself holds {'; '.join(told[:4])}: mend the data, lw.data.summary(data) counts "
            "them, or fill in what is missing, such as by torch.nan_to_num"
        )


def _not_finite(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Tensor):
        if value.layout is torch.strided and value.is_floating_point():
            bad = ~torch.isfinite(value.detach())
            if count := int(bad.sum()):
                first = bad.nonzero()[0].tolist()
                are = "s that are" if count > 1 else " that is"
                yield f"{count} value{are} not finite in {path}, the first at {first}"
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _not_finite(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _not_finite(part, f"{path}[{i}]")
