"""Random numbers of a callback's own: a stream that depends on the key of the run, the epoch and the batch."""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

from loopwright._compat import gamma_draws
from loopwright.data.plan import seed_from
from loopwright.events import Callback
from loopwright.progress import Progress
from loopwright.state import Run

__all__ = ["Draws"]


class Draws:
    """A generator that is seeded anew for each batch from (key, epoch, batch), and from nothing else.

    So the global generators and the order of the data stay as they are, nothing is to be saved, and a resumed run
    draws what it would have drawn. Two callbacks of a kind, and ranks, draw differently.
    """

    def __init__(self) -> None:
        self._generator: torch.Generator | None = None
        self._base, self._nth = 0, 0
        self._at: Progress | None = None

    def begin(self, run: Run, owner: Callback, device: torch.device | str = "cpu") -> None:
        """For ``on_fit_start``: the stream of ``owner`` in ``run``, on ``device``."""
        alike = [callback for callback in run.callbacks if type(callback) is type(owner)]
        place = next((i for i, callback in enumerate(alike) if callback is owner), 0)
        self._base = seed_from(type(owner).__qualname__, place, run.settings["key"], run.comm.rank)
        self._generator, self._at = torch.Generator(device), None

    def next(self, run: Run) -> torch.Generator:
        """For ``map_batch``, once a batch: the generator, at the start of what belongs to this batch."""
        assert self._generator is not None
        p = run.progress
        if p is self._at:
            self._nth += 1  # of its window: progress counts a window when it is complete
        else:
            self._at, self._nth = p, 0
        where = struct.pack("<4q", self._base, p.epoch, p.batch, self._nth)
        seed = int.from_bytes(hashlib.blake2b(where, digest_size=8).digest(), "little") >> 1
        return self._generator.manual_seed(seed)


def beta(alpha: float, rng: torch.Generator) -> float:
    """One number from Beta(alpha, alpha): two gamma variates, the first over their sum."""
    first, second = gamma_draws(torch.full((2,), alpha, dtype=torch.float64), rng).tolist()
    return first / (first + second) if first + second > 0 else 0.5


def betas(count: int, alpha: float, rng: torch.Generator) -> Tensor:
    """``count`` numbers from Beta(alpha, alpha), float64."""
    first, second = gamma_draws(torch.full((2, count), alpha, dtype=torch.float64), rng).unbind()
    return (first / (first + second)).nan_to_num(0.5)
