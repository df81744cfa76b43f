"""Any function of a batch, applied on the device while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loopwright.callbacks.draws import Draws
from loopwright.data.readers import takes_rng
from loopwright.events import Callback
from loopwright.state import Run

__all__ = ["BatchTransform"]


class BatchTransform(Callback):
    """Trains on ``fn(batch)``: augmentation of whole batches, after they were moved to the device.

    ``fn(batch, rng)`` gets a ``torch.Generator`` on the device of the run, seeded from (key of the run, epoch, batch):
    what it draws there is the same after a resume and moves no other stream. Each rank calls ``fn`` with its own slice.
    Only training batches pass through; what validation needs as well, such as normalising, belongs into the dataset, or
    as a module in front of the net.

    Reads: batches. Changes: batches. Stops: no. Raises SettingError for what takes neither one nor two arguments.

    >>> flip = BatchTransform(lambda batch: (batch[0].flip(-1), batch[1]))
    >>> flip.takes_rng
    False
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.takes_rng = fn, takes_rng(fn, name="fn", of="batch")
        self._draws = Draws()

    def on_fit_start(self, run: Run) -> None:
        self._draws.begin(run, self, run.device)

    def map_batch(self, run: Run, batch: Any) -> Any:
        return self.fn(batch, self._draws.next(run)) if self.takes_rng else self.fn(batch)
