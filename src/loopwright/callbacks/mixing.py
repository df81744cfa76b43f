"""What MixUp and CutMix share: partners, soft targets, and a stream of their own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from loopwright.callbacks.draws import Draws
from loopwright.callbacks.parts import Key, floats, part, with_parts
from loopwright.errors import DataError, SettingError
from loopwright.events import Callback, describe
from loopwright.state import Phase, Run

__all__ = ["Mixing", "mixed"]


class Mixing(Callback):
    """A callback that mixes each sample of a batch with another one, and their targets by the same shares.

    Class indices become soft targets, rows of ``classes`` numbers that sum to 1, which the loss must take (torch's
    cross entropy does). Floating targets are mixed as they are. Metrics of training are fed the class with the largest
    share. Derive from it and write ``mix``.
    """

    def __init__(self, alpha: float, *, classes: int | None, p: float, inputs: Key, target: Key) -> None:
        name = type(self).__name__
        if not alpha > 0:
            raise SettingError(f"{name}(alpha={alpha!r}): expected a number above 0, as for Beta(alpha, alpha)")
        if not 0 < p <= 1:
            raise SettingError(f"{name}(p={p!r}): expected the share of batches to mix, above 0 and at most 1")
        if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 2):
            raise SettingError(f"{name}(classes={classes!r}): expected the number of classes, from 2, or None")
        self.alpha, self.classes, self.p, self.inputs, self.target = float(alpha), classes, p, inputs, target
        self._draws = Draws(self.alpha)

    def mix(self, x: Tensor, order: Tensor, drawn: Draws, rng: torch.Generator) -> tuple[Tensor, float | Tensor]:
        """``x`` mixed with ``x[order]``, and the share of ``x`` in it: a number, or one for each sample."""
        raise NotImplementedError

    def on_fit_start(self, run: Run) -> None:
        self._draws.begin(run, self)

    def map_batch(self, run: Run, batch: Any) -> Any:
        name, drawn = type(self).__name__, self._draws
        rng = drawn.next(run)
        x = floats(batch, self.inputs, name)
        y = self._soft(part(batch, self.target, name), x)
        if self.p == 1 or drawn.uniform[2] < self.p:
            order = torch.randperm(x.size(0), generator=rng)
            if not x.is_cpu:
                order = order.to(x.device, non_blocking=True)
            x, share = self.mix(x, order, drawn, rng)
            y = mixed(y, order, share)
        return with_parts(batch, {self.inputs: x, self.target: y})

    def map_output(self, run: Run, output: Any, batch: Any, phase: Phase) -> Any:
        if phase.meters is None or self.classes is None:
            return output
        target = part(batch, self.target, type(self).__name__)
        return {**output, "target": target.argmax(1)} if output.get("target") is target else output

    def _soft(self, target: Any, x: Tensor) -> Tensor:
        name, n = type(self).__name__, x.size(0)
        if not isinstance(target, Tensor) or not target.dim() or target.size(0) != n or target.is_complex():
            raise DataError(f"{name} needs a tensor of targets, one for each sample; got {describe(target)}")
        if target.is_floating_point():
            return target
        if self.classes is None:
            raise DataError(
                f"the target is {describe(target)}: class indices cannot be mixed as they are. Say how many classes "
                f"there are, lw.{name}(classes=10), to train on soft targets"
            )
        if target.dtype != torch.int64:
            target = target.long()
        if target.dim() == 1:
            return x.new_zeros(n, self.classes).scatter_(1, target.unsqueeze(1), 1.0)
        return one_hot(target, self.classes).movedim(-1, 1).to(x.dtype)


def mixed(x: Tensor, order: Tensor, share: float | Tensor) -> Tensor:
    """``share * x + (1 - share) * x[order]``; ``share`` is a number, or one for each sample."""
    if type(share) is not float:
        share = cast(Tensor, share).to(x).view(-1, *[1] * (x.dim() - 1))
    return torch.lerp(x[order], x, share)
