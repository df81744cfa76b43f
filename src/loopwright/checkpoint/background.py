"""What lets training go on while a checkpoint is written: copies of the tensors, and a thread for the rest."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from loopwright.checkpoint.encode import same_memory
from loopwright.checkpoint.store import Packed

__all__ = ["Copies", "in_background"]


class Copies:
    """Memory on the CPU for one copy of all tensors of a checkpoint, used again for the next one.

    Tensors that are the same memory stay one; strides stay. Copies from a device are started together and waited for
    once. Reuse it only when nobody reads the copies any more.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def of(self, packed: Packed) -> Packed:
        """The same checkpoint, whose tensors nobody else changes."""
        made: dict[Any, Tensor] = {}
        kept: dict[tuple[str, str], Tensor] = {}
        for group, named in packed.groups.items():
            for name, tensor in named.items():
                memory = same_memory(tensor)
                if memory is None or memory not in made:
                    made[memory] = _copied(tensor.detach(), self._kept.get((group, name)))
                kept[group, name] = made[memory]
        for device in {t.device for named in packed.groups.values() for t in named.values() if t.is_cuda}:
            torch.cuda.synchronize(device)
        self._kept = kept
        groups = {g: {name: kept[g, name] for name in named} for g, named in packed.groups.items()}
        return dataclasses.replace(packed, groups=groups)


def _copied(tensor: Tensor, memory: Tensor | None) -> Tensor:
    fits = memory is not None and (memory.dtype, memory.shape) == (tensor.dtype, tensor.shape)
    if memory is None or not fits or memory.stride() != tensor.stride():
        memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return memory.copy_(tensor, non_blocking=tensor.is_cuda)


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """Begin ``work`` in a thread that the process waits for before it exits; its result, or what it raised."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="loopwright checkpoint").start()
    return future
