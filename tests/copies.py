"""What copies to a GPU ahead, on the CPU: says in which order it is asked for what, and makes no use of a device."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from loopwright.data import ahead


class Copies:
    """In the place of ``CudaCopier``: the copies are tensors without numbers; a batch is known by its first number."""

    log: ClassVar[list[Any]] = []
    full: ClassVar[bool] = False

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype

    def takes(self, tensor: Tensor) -> bool:
        return tensor.is_cpu

    def begin(self, tensors: list[Tensor]) -> tuple[list[Tensor], Any]:
        number = tensors[0].flatten()[0].item()
        if Copies.full and number:
            Copies.log.append(("no room", number))
            raise torch.OutOfMemoryError("CUDA out of memory")
        Copies.log.append(("begin", number))
        return [tensor.to("meta") for tensor in tensors], number

    def wait(self, copied: Any) -> None:
        Copies.log.append(("wait", copied))


def use_copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let runs on the CPU copy ahead as those on CUDA do; the list of what they asked for."""
    monkeypatch.setattr(ahead, "CudaCopier", Copies)
    monkeypatch.setattr(ahead, "_DEVICE", "cpu")
    monkeypatch.setattr(ahead, "_LEAST", 1)
    monkeypatch.setattr(Copies, "log", [])
    monkeypatch.setattr(Copies, "full", False)
    return Copies.log
