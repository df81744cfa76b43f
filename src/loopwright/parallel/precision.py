"""How numbers are held while a step runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from loopwright.errors import SettingError, choose
from loopwright.state import Precision

__all__ = ["Autocast", "Plain", "pick_precision"]


class Plain:
    """Numbers as the model and the data have them; nothing is done."""

    plain = True

    def __init__(self, name: str = "fp32") -> None:
        self.name = name

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()


class Autocast:
    """torch.autocast around the step, for a dtype that needs no gradient scaling (bfloat16)."""

    plain = False

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=self.dtype)


def pick_precision(precision: str | Precision) -> Precision:
    """The object for ``"fp32"`` or ``"bf16"``; an object with ``name``, ``plain`` and ``autocast`` passes through.

    >>> pick_precision("bf16").dtype
    torch.bfloat16
    """
    if not isinstance(precision, str):
        if not all(hasattr(precision, name) for name in ("name", "plain", "autocast")):
            raise SettingError(f"precision={precision!r}: expected 'fp32', 'bf16' or an object with autocast(device)")
        return precision
    if precision == "fp32":
        return Plain()
    if precision == "bf16":
        return Autocast("bf16", torch.bfloat16)
    raise SettingError(f"precision={precision!r} is unknown. {choose(precision, ['fp32', 'bf16'])}")
