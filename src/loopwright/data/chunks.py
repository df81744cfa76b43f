"""Long sequences in pieces: truncated back-propagation through time, as data."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loopwright.data.batch import move, tensors_in, with_tensors
from loopwright.errors import DataError, LoopwrightError, StepOutputError
from loopwright.state import Source

__all__ = ["Chunks", "chunked"]

_END = object()


def chunked(batch: Any, length: int) -> Iterator[Any]:
    """``batch`` in pieces of ``length`` steps along dimension 1; the last one may be shorter.

    The first tensor with two dimensions or more tells how many steps there are; every tensor with as many along its
    dimension 1 is cut, all else goes into each piece as it is. Raises DataError for a batch without such a tensor.

    >>> [[tuple(t.shape) for t in piece] for piece in chunked((torch.zeros(2, 5, 3), torch.zeros(2)), 2)]
    [[(2, 2, 3), (2,)], [(2, 2, 3), (2,)], [(2, 1, 3), (2,)]]
    """
    steps = next((leaf.size(1) for leaf in tensors_in(batch) if leaf.dim() > 1), None)
    if steps is None:
        raise DataError("truncate= cuts batches along dimension 1, and this batch has no tensor with two dimensions")
    for start in range(0, steps, length):
        piece = slice(start, start + length)

        def taken(t: Tensor, piece: slice = piece) -> Tensor:
            return t[:, piece] if t.dim() > 1 and t.size(1) == steps else t

        yield with_tensors(batch, taken)


class Chunks:
    """The batches of ``source`` in pieces, and what a step carries from each piece to the next one.

    All of it is in ``state_dict``, the rest of the open batch too: a resume inside of a sequence is as exact as one of
    ``source`` between its batches.

    >>> from loopwright.data import as_source
    >>> whole = as_source([torch.arange(6.0).view(1, 6)], train=True, key=0)
    >>> [piece.tolist() for piece in Chunks(whole, lambda batch: batch.split(4, dim=1)).at(0, 0)]
    [[[0.0, 1.0, 2.0, 3.0]], [[4.0, 5.0]]]
    """

    def __init__(self, source: Source, pieces: Callable[[Any], Iterable[Any]]) -> None:
        self.source, self.pieces = source, pieces
        self.carried: dict[str, Any] = {}  # by phase
        self.batch: Any = None  # the open one, as the source gave it
        self._rest: deque[Any] = deque()  # of the open batch
        self._whole = self._given = 0  # batches that were begun, pieces that were given, in the open epoch
        self._goes_on = self._loaded = False

    batches = None

    @property
    def exact(self) -> list[str]:
        return self.source.exact

    @property
    def waited(self) -> float:
        return float(getattr(self.source, "waited", 0.0))

    def sizes(self, batch: int) -> Iterator[int] | None:
        return None

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        goes_on, self._goes_on = self._goes_on and batch == self._given, False
        if not goes_on:
            self.carried.clear()
            self._rest.clear()
            self._whole = self._given = 0
        whole = self.source.at(epoch, self._whole)
        try:
            while True:
                while self._rest:
                    piece = self._rest.popleft()
                    self._given += 1
                    if self._given > batch:
                        yield piece
                self.batch = next(whole, _END)
                if self.batch is _END:
                    return
                self._rest.extend(self.pieces(self.batch))
                self._whole += 1
                self.carried.clear()  # a sequence begins
        finally:
            self.batch = None
            if hasattr(whole, "close"):
                whole.close()

    def carrying(self, name: str, step: Callable[[Any, Any], Any]) -> Callable[[Any], dict[str, Any]]:
        """``step(batch, carry)`` of the phase ``name`` as a step of the batch alone.

        It raises StepOutputError where the step does not return what is to be carried.
        """

        def of_a_chunk(batch: Any) -> dict[str, Any]:
            carry = self.carried.get(name)
            if self._loaded and carry is not None:  # from a checkpoint, and hence on the CPU
                device = next((leaf.device for leaf in tensors_in(batch)), torch.device("cpu"))
                carry = move(carry, device)
            try:
                output = step(batch, carry)
            except (RuntimeError, ValueError) as error:
                if (told := _uneven(self.batch, error)) is not None:
                    raise DataError(told) from error
                raise
            if not isinstance(output, Mapping) or "carry" not in output:
                raise StepOutputError(
                    f"step {name!r} does not return 'carry', what the next piece of the sequence begins with; with "
                    'truncate= write: def training_step(self, batch, carry=None): ... return {"loss": loss, "carry": h}'
                )
            output = dict(output)
            self.carried[name] = with_tensors(output.pop("carry"), Tensor.detach)
            self._loaded = False
            return output

        return of_a_chunk

    def state_dict(self) -> dict[str, Any]:
        given = {"whole": self._whole, "batch": self._given, "rest": list(self._rest), "carried": dict(self.carried)}
        return {**given, "source": self.source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self._whole, self._given, self._rest = state["whole"], state["batch"], deque(state["rest"])
        self.carried = dict(state["carried"])
        self._goes_on = self._loaded = True

    def close(self) -> None:
        if hasattr(self.source, "close"):
            self.source.close()


def _uneven(batch: Any, error: Exception) -> str | None:
    """What to say of a step that failed by a tensor which was not cut, being not as long as the first one."""
    lengths = list(dict.fromkeys(leaf.size(1) for leaf in tensors_in(batch) if leaf.dim() > 1))
    if isinstance(error, LoopwrightError):
        return None
    numbers = {int(number) for number in re.findall(r"\d+", str(error))}
    whole = next((n for n in lengths[1:] if n > 1 and any(number and number % n == 0 for number in numbers)), None)
    if whole is None:
        return None
    return (
        f"truncate= cuts what has {lengths[0]} steps along dimension 1, as the first tensor of the batch has; another "
        f"one has {whole}, goes into each piece whole, and the step failed: {error}. Give both the same number of steps"
    )
