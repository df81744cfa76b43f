"""Random numbers of a callback's own: a stream that depends on the key of the run, the epoch and the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from loopwright._compat import gamma_draws
from loopwright.data.plan import seed_from
from loopwright.events import Callback
from loopwright.parallel import readers
from loopwright.progress import Progress
from loopwright.state import Run

__all__ = ["Draws"]


_BLOCK = 256  # batches for which the cheap numbers are drawn in one go


class Draws:
    """Random numbers for each batch that depend on (key, epoch, batch), and on nothing else.

    So the global generators and the order of the data stay as they are, nothing is to be saved, and a resumed run
    draws what it would have drawn. Two callbacks of a kind, and ranks, draw differently. With ``alpha`` each batch has
    a ``share`` as well, from Beta(alpha, alpha), and ``uniform``, three numbers from 0 to 1.
    """

    def __init__(self, alpha: float | None = None) -> None:
        self.alpha = alpha
        self.share, self.uniform = 1.0, [0.0, 0.0, 0.0]
        self._generator: torch.Generator | None = None
        self._base, self._nth = 0, 0
        self._at: Progress | None = None
        self._block: tuple[int, int] | None = None
        self._seeds: list[int] = []

    def begin(self, run: Run, owner: Callback, device: torch.device | str = "cpu") -> None:
        """For ``on_fit_start``: the stream of ``owner`` in ``run``, on ``device``."""
        alike = [callback for callback in run.callbacks if type(callback) is type(owner)]
        place = next((i for i, callback in enumerate(alike) if callback is owner), 0)
        self._base = seed_from(type(owner).__qualname__, place, run.settings["key"], readers(run).rank)
        self._generator, self._at, self._block = torch.Generator(device), None, None

    def next(self, run: Run) -> torch.Generator:
        """For ``map_batch``, once a batch: the generator, at the start of what belongs to this batch."""
        assert self._generator is not None
        p = run.progress
        if p is self._at:
            self._nth += 1  # of its window: progress counts a window when it is complete
        else:
            self._at, self._nth = p, 0
        number = p.batch + self._nth
        if self._block != (p.epoch, number // _BLOCK):
            self._block = (p.epoch, number // _BLOCK)
            self._draw(*self._block)
        number %= _BLOCK
        if self.alpha is not None:
            self.share, self.uniform = self._shares[number], self._uniforms[number]
        return self._generator.manual_seed(self._seeds[number])

    def _draw(self, epoch: int, block: int) -> None:
        rng = torch.Generator().manual_seed(seed_from(self._base, epoch, block))
        self._seeds = torch.randint(2**62, (_BLOCK,), generator=rng).tolist()
        if self.alpha is not None:
            self._shares = betas(_BLOCK, self.alpha, rng).tolist()
            self._uniforms = torch.rand(_BLOCK, 3, generator=rng, dtype=torch.float64).tolist()


def betas(count: int, alpha: float, rng: torch.Generator) -> Tensor:
    """``count`` numbers from Beta(alpha, alpha), float64: of two gamma variates the first over their sum."""
    first, second = gamma_draws(torch.full((2, count), alpha, dtype=torch.float64), rng).unbind()
    return (first / (first + second)).nan_to_num(0.5)
