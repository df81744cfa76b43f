"""What MixUp and CutMix share: partners, soft targets, and a stream of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_margin_loss, nll_loss, one_hot

from loopwright.callbacks.draws import Draws, betas
from loopwright.callbacks.parts import Key, floats, part, with_parts
from loopwright.errors import DataError, SettingError
from loopwright.events import Callback, describe
from loopwright.state import Phase, Run

__all__ = ["Mixing", "mixed"]

_OF_INDICES = (nn.NLLLoss, nn.MultiMarginLoss)  # torch's that take no soft target
_FUNCTIONS = (nll_loss, multi_margin_loss)


class Mixing(Callback):
    """A callback that mixes each sample of a batch with another one, and their targets by the same shares.

    Class indices become soft targets, rows of ``classes`` numbers that sum to 1, which the loss must take (torch's
    cross entropy does). Floating targets are mixed as they are. Metrics of training are fed the class with the largest
    share. Derive from it and write ``mix``.
    """

    _ranges: ClassVar = {"alpha": (0.0, math.inf)}  # where a schedule may take it

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
        self._made: Tensor | None = None  # the targets of a batch, until its loss is there

    def mix(self, x: Tensor, order: Tensor, drawn: Draws, rng: torch.Generator) -> tuple[Tensor, float | Tensor]:
        """``x`` mixed with ``x[order]``, and the share of ``x`` in it: a number, or one for each sample."""
        raise NotImplementedError

    def problems(self, run: Run) -> Iterator[str]:
        of_task = getattr(run.task, "loss", None)
        losses = [of_task if stage.loss is None else stage.loss for stage in run.stages]
        for loss in {id(loss): loss for loss in losses}.values():
            for term in getattr(loss, "terms", {"": loss}).values():
                what = _why_not(term)
                if what:
                    yield (
                        f"{type(self).__name__} makes soft targets, rows of a share for each class, and {what}; train "
                        "with nn.CrossEntropyLoss(), on scores without a softmax, or leave it out"
                    )

    def on_fit_start(self, run: Run) -> None:
        self._draws.begin(run, self)

    def map_batch(self, run: Run, batch: Any) -> Any:
        name, drawn = type(self).__name__, self._draws
        rng = drawn.next(run)
        if self.alpha != drawn.alpha:  # it follows a schedule (Anneal): nothing is drawn ahead
            drawn.share = self._share(rng)
        x = floats(batch, self.inputs, name)
        y = self._soft(part(batch, self.target, name), x)
        if (self.p == 1 or drawn.uniform[2] < self.p) and self.alpha:
            order = torch.randperm(x.size(0), generator=rng)
            if not x.is_cpu:
                order = order.to(x.device, non_blocking=True)
            x, share = self.mix(x, order, drawn, rng)
            y = mixed(y, order, share)
        self._made = y if self.classes is not None else None
        return with_parts(batch, {self.inputs: x, self.target: y})

    def on_exception(self, run: Run, error: BaseException) -> None:
        if self._made is not None and isinstance(error, (RuntimeError, ValueError, IndexError)):
            error.add_note(
                f"[loopwright] {type(self).__name__}(classes={self.classes}) has made the target "
                f"{describe(self._made)}: the loss has to take it, and the net to give as many scores for each sample"
            )
        self._made = None

    def map_output(self, run: Run, output: Any, batch: Any, phase: Phase) -> Any:
        self._made = None
        if phase.meters is None or self.classes is None:
            return output
        target = part(batch, self.target, type(self).__name__)
        return {**output, "target": target.argmax(1)} if output.get("target") is target else output

    def _share(self, rng: torch.Generator) -> float:
        if self.alpha < 0:
            raise SettingError(
                f"{type(self).__name__}: alpha has become {self.alpha:g}; expected 0 (no mixing) or more"
            )
        return float(betas(1, self.alpha, rng)) if self.alpha else 1.0

    def _soft(self, target: Any, x: Tensor) -> Tensor:
        name, n = type(self).__name__, x.size(0)
        if not isinstance(target, Tensor) or not target.dim() or target.size(0) != n or target.is_complex():
            raise DataError(f"{name} needs a tensor of targets, one for each sample; got {describe(target)}")
        if target.is_floating_point():
            if self.classes is not None and (target.dim() < 2 or target.size(1) != self.classes):
                raise DataError(
                    f"{name}(classes={self.classes}) makes soft targets of class indices, and the target is "
                    f"{describe(target)}, which is mixed as it is; leave classes out"
                )
            return target
        if self.classes is None:
            raise DataError(
                f"the target is {describe(target)}: class indices cannot be mixed as they are. Say how many classes "
                f"there are, lw.{name}(classes=10), to train on soft targets"
            )
        if target.dtype != torch.int64:
            target = target.long()
        try:
            if target.dim() == 1:
                return x.new_zeros(n, self.classes).scatter_(1, target.unsqueeze(1), 1.0)
            return one_hot(target, self.classes).movedim(-1, 1).to(x.dtype)
        except RuntimeError as error:
            low, high = int(target.min()), int(target.max())
            if low >= 0 and high < self.classes:
                raise
            raise DataError(
                f"the target has classes from {low} to {high}, and {name}(classes={self.classes}) makes soft targets "
                f"for 0 to {self.classes - 1}; say classes={max(high, 1) + 1}, and leave out samples without a class"
            ) from error


def _why_not(loss: Any) -> str | None:
    """Why ``loss`` cannot take soft targets, where that is known."""
    if isinstance(loss, nn.CrossEntropyLoss) and loss.ignore_index >= 0:
        return f"CrossEntropyLoss(ignore_index={loss.ignore_index}) needs class indices to leave one out"
    if not isinstance(loss, _OF_INDICES) and all(loss is not one for one in _FUNCTIONS):
        return None
    return f"{getattr(loss, '__name__', type(loss).__name__)} takes class indices alone"


def mixed(x: Tensor, order: Tensor, share: float | Tensor) -> Tensor:
    """``share * x + (1 - share) * x[order]``; ``share`` is a number, or one for each sample."""
    if type(share) is not float:
        share = cast(Tensor, share).to(x).view(-1, *[1] * (x.dim() - 1))
    return torch.lerp(x.index_select(0, order), x, share)  # x[order] gives the same, for twice the time
