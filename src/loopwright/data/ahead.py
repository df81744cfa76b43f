"""The next batch on its way to the device while a step computes.

A batch that workers have read is fetched one step before it is trained on, and its copy begins then. What is handed on
is still the batch on the host: ``move`` takes the copy in its place, where batches are moved, so that all that comes
before (weights, hooks, pieces of a sequence) sees what it always saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from loopwright.data.batch import note_begun, plain_tensors
from loopwright.data.chunks import Chunks
from loopwright.data.share import Shared

__all__ = ["Ahead", "Copier", "copy_ahead"]

_DEVICE = "cuda"
_LEAST = 1 << 20  # bytes of a batch: to copy fewer takes less time than to do it ahead


class Copier(Protocol):
    """Copies tensors to a device while that does something else."""

    device: torch.device

    def takes(self, tensor: Tensor) -> bool:
        """True for what can be copied meanwhile."""

    def begin(self, tensors: list[Tensor]) -> tuple[list[Tensor], Any]:
        """The copies, which are being made, and what to wait for."""

    def wait(self, copied: Any) -> None:
        """What the device is told from now on happens after those copies."""


class CudaCopier:
    """Copies on a stream of its own, from pinned memory.

    The copies lie in memory of the stream that computes, taken when they begin: they wait for what that stream has to
    do by then, which may still use this memory, and the stream waits for them before a batch is handed out, or is
    dropped. So memory is used again in the order of one stream, as without a second one, and needs no
    ``record_stream``: with that, it would come free only when the host sees that both streams are through with it.
    ``dtype`` is that to which floating tensors are converted; these are left to ``move``.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype, self.stream = device, dtype, torch.cuda.Stream(device)

    def takes(self, tensor: Tensor) -> bool:
        if self.dtype is not None and tensor.is_floating_point() and tensor.dtype != self.dtype:
            return False
        return tensor.is_cpu and tensor.is_pinned()

    def begin(self, tensors: list[Tensor]) -> tuple[list[Tensor], Any]:
        current = torch.cuda.current_stream(self.device)
        made = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device) for t in tensors]
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for new, tensor in zip(made, tensors, strict=True):
                new.copy_(tensor, non_blocking=True)
            return made, self.stream.record_event()

    def wait(self, copied: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)


class Ahead:
    """``batches``, the next of which is fetched, and its copy begun, before the one that is asked for is given.

    An error in fetching it is raised where it would have been without. If a pass begins with a batch that is not worth
    it (small, on the device already, not pinned), nothing in it is fetched ahead.
    """

    def __init__(self, batches: Iterator[Any], copier: Copier) -> None:
        self.batches, self.copier = batches, copier
        self._next: tuple[Any, Any, Exception | None] | None = None  # a batch, its copies, or an error in its place
        self._first, self._plain, self._full = True, False, False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._plain:
            return next(self.batches)
        if self._next is None:
            self._fetch()
        assert self._next is not None
        (batch, copied, error), self._next = self._next, None
        if error is not None:
            self._plain = True
            try:
                raise error
            finally:
                del error  # or its own traceback would hold it, and with it the workers
        if copied is not None:
            self.copier.wait(copied)
        if self._first:  # given at once: it is what training waits for
            self._first, self._plain = False, copied is None
        else:
            self._fetch()
        return batch

    @property
    def held(self) -> int:
        """Batches that were fetched and not yet given: 0 or 1."""
        return int(self._next is not None and self._next[2] is None)

    def _fetch(self) -> None:
        try:
            batch = next(self.batches)
            self._next = batch, self._begin(batch), None
        except Exception as error:  # the end of the data as well
            self._next = None, None, error

    def _begin(self, batch: Any) -> Any:
        tensors = [tensor for tensor in plain_tensors(batch) if self.copier.takes(tensor)]
        if self._full or sum(tensor.nbytes for tensor in tensors) < _LEAST:
            return None
        try:
            copies, copied = self.copier.begin(tensors)
        except torch.OutOfMemoryError:
            self._full = True  # each try would empty the allocator's cache
            return None
        for tensor, copy in zip(tensors, copies, strict=True):
            note_begun(tensor, copy)
        return copied

    def close(self) -> None:
        """Drop what was fetched; it cannot be dropped while it is being copied."""
        dropped, self._next, self._plain = self._next, None, True
        if dropped is not None and dropped[1] is not None:
            self.copier.wait(dropped[1])

    __del__ = close


def copy_ahead(source: Any, device: torch.device, dtype: torch.dtype | None) -> None:
    """Let what workers read of ``source`` be copied to ``device`` ahead; elsewhere than on CUDA, nothing is."""
    while hasattr(source, "source"):
        if isinstance(source, (Chunks, Shared)):
            return  # what is moved is a piece of what is read
        source = source.source
    several = getattr(source, "sources", None)  # of a Mix
    for one in several.values() if isinstance(several, dict) else ():
        copy_ahead(one, device, dtype)
    if hasattr(source, "ahead_copier"):
        known = source.ahead_copier
        if device.type != _DEVICE:
            source.ahead_copier = None
        elif known is None or known.device != device or known.dtype != dtype:
            source.ahead_copier = CudaCopier(device, dtype)
