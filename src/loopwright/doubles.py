"""What to say where data does not fit its module or loss, or a step the loop: the usual cause, and what to type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from traceback import walk_tb
from types import FrameType
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
_FLOATS = "this loss takes targets as floats: y.float(), array.astype('float32') or frame['y'].astype('float32')"
_TWICE = (
    "the loop goes backward from the loss that a step returns: leave loss.backward() out of the step; and what is kept "
    "from one step to the next, such as a hidden state, is kept without its graph: h.detach()"
)
_ONE = (
    "the batch has one sample, and BatchNorm needs two or more to train: leave the short last batch out, "
    "lw.Loader(data, batch_size=32, drop_last=True) or DataLoader(..., drop_last=True), or choose a batch_size that "
    "leaves none of one"
)
_LOG = (
    "a task has no log: return values by their names with the loss, {'loss': loss, 'accuracy': accuracy}; callbacks "
    "and handlers write run.log({'name': value})"
)
_INTEGERS = {"byte", "char", "short", "int", "long", "unsigned"}  # torch's words for dtypes


def add_doubles(error: BaseException) -> None:
    """Where a step fails for a usual cause, such as dtypes or shapes of data, note on ``error``, once, what to do.

    >>> error = RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")
    >>> add_doubles(error)
    >>> error.__notes__[0][:46]
    '[loopwright] floats of NumPy and Python are fl'
    """
    note = next((note for kind, tell in _HINTS if isinstance(error, kind) and (note := tell(error))), None)
    if note is not None and f"[loopwright] {note}" not in getattr(error, "__notes__", ()):
        error.add_note(f"[loopwright] {note}")


def _frames(error: BaseException) -> list[tuple[str, FrameType]]:
    """The frames that ``error`` has come by, the innermost last, each with the name of its module."""
    return [(str(frame.f_globals.get("__name__")), frame) for frame, _ in walk_tb(error.__traceback__)]


def _outside_torch(error: BaseException) -> tuple[str, str, dict[str, Any]]:
    """Module, name and variables of the function that has called into torch, or that has failed itself."""
    own = [(name, frame) for name, frame in _frames(error) if name.partition(".")[0] != "torch"]
    return (own[-1][0], own[-1][1].f_code.co_name, own[-1][1].f_locals) if own else ("", "", {})


def _of_dtypes(error: BaseException) -> str | None:
    text = str(error)
    words = set(re.findall(r"\w+", text.lower()))
    if "can't be cast to the desired output type Long" in text or text == "Found dtype Long but expected Float":
        return _FLOATS if _called_in(error, "torch.nn.functional", "binary_cross_entropy") else None
    if "multi-target not supported" in text:
        return _COLUMN
    if "target dtype to be Long" in text or "expected scalar type Long" in text:
        return _CLASSES
    if {"double", "float"} <= words:
        return _DOUBLES
    return _WHOLE if "same" in words and "float" in words and words & _INTEGERS else None


def _called_in(error: BaseException, module: str, function: str) -> dict[str, Any] | None:
    """The variables of the innermost function of that name in ``module``; None where it was not called."""
    found = [f for name, f in _frames(error) if name == module and f.f_code.co_name.startswith(function)]
    return found[-1].f_locals if found else None


def _of_classes(error: BaseException) -> str | None:
    """Of targets that are no numbers of classes."""
    given = _called_in(error, "torch.nn.functional", "cross_entropy") if "out of bounds" in str(error) else None
    if given is None:
        return None
    target, outputs = given["target"], int(given["input"].shape[1 if given["input"].dim() > 1 else 0])
    target = target[target != given["ignore_index"]]
    low, high = int(target.min()), int(target.max())
    way = f"give the module {high + 1} outputs"
    if low < 0:
        left_out = f"nn.CrossEntropyLoss(ignore_index={low}) leaves those without a class out"
        way = f"for yes or no write (y > 0).long(); {left_out}"
    elif low > 0:
        way = f"where they are counted from 1 write y - 1, else {way}"
    return (
        f"the module gives {outputs} outputs, for the classes 0 to {outputs - 1}, and the batch has targets from {low} "
        f"to {high}: {way}"
    )


def _of_channels(error: BaseException) -> str | None:
    """Of images that come without a dimension of channels, so that the batch is taken for them."""
    refused = "channels, but got" in str(error)
    given = _called_in(error, "torch.nn.modules.conv", "_conv_forward") if refused else None
    if given is None or given["self"].in_channels != 1 or given["input"].dim() != len(given["self"].kernel_size) + 1:
        return None
    return (
        f"{type(given['self']).__name__} was given {list(given['input'].shape)}, which has no dimension for the "
        "channel: images.unsqueeze(1) or array[:, None] adds it"
    )


def _of_graph(error: BaseException) -> str | None:
    again = "backward through the graph a second time" in str(error)
    return _TWICE if again and _outside_torch(error)[0].startswith("loopwright.") else None


def _of_one(error: BaseException) -> str | None:
    one = str(error).startswith("Expected more than 1 value per channel")
    return _ONE if one and _called_in(error, "torch.nn.functional", "batch_norm") else None


def _of_log(error: BaseException) -> str | None:
    if re.search(r"has no attribute 'log(_dict)?'$", str(error)) is None:
        return None
    return _LOG if hasattr(_outside_torch(error)[2].get("self"), "training_step") else None


def _of_arguments(error: BaseException) -> str | None:
    """Of a module that ``Supervised`` called with the parts of a batch, or the names in it, that it does not take."""
    found = _called_in(error, "loopwright.task", "_any_step")
    if "argument" not in str(error):
        return None
    if found is None:
        given = (_called_in(error, "loopwright.task", "training_step") or {}).get("inputs")
        if not isinstance(given, Mapping) or _outside_torch(error)[1] != "training_step":
            return None
        return (
            f"the module was passed the dict {{{', '.join(f'{key!r}: ...' for key in given)}}} as one argument; to "
            "pass what is in it by name, write Supervised(..., inputs=lambda batch: batch[0])"
        )
    if not found.get("kwargs"):
        n, by_itself = len(found["args"]), _outside_torch(error)[1] == "_any_step"
        if n < 2 or found["pick"] is not None or not by_itself:
            return None
        return (
            f"of a batch of {n + 1} parts the module was passed the first {n}, and the last is the target. Say which "
            "is which: Supervised(..., inputs=0, targets=1); inputs=[0, 1] passes two"
        )
    keys = list(found["batch"]) if isinstance(found["batch"], Mapping) else list(found["kwargs"])
    x, y = repr(keys[0]), repr(keys[-1]) if len(keys) > 1 else "..."
    return (
        f"the module was called with the names {', '.join(map(repr, found['kwargs']))}, as a dict of arrays gives "
        f"them. Say which is the input and which the target: Supervised(..., inputs={x}, targets={y}); inputs={x} is "
        f"passed by position, inputs=[{x}] by its name"
    )


_HINTS: tuple[tuple[type[Exception], Callable[[BaseException], str | None]], ...] = (
    (RuntimeError, _of_dtypes), (RuntimeError, _of_channels), (RuntimeError, _of_graph), (IndexError, _of_classes),
    (ValueError, _of_one), (AttributeError, _of_log), (TypeError, _of_arguments),
)  # fmt: skip


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
