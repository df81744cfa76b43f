"""CutMix: train on images with a rectangle of another image pasted in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loopwright.callbacks.draws import Draws
from loopwright.callbacks.mixing import Mixing
from loopwright.callbacks.parts import Key
from loopwright.errors import DataError
from loopwright.events import describe

__all__ = ["CutMix"]


class CutMix(Mixing):
    """Pastes a rectangle of image j into each image i and mixes their targets by area; j comes from a permutation.

    Images are ``[samples, ..., height, width]``. Once a batch a share is drawn from Beta(alpha, alpha), and a rectangle
    of ``1 - share`` of the area, with the shape of the image and its centre anywhere in it. What lies outside is cut
    off, and targets are mixed by the area that was really pasted, as in the authors' code. ``classes``, ``p``,
    ``inputs``, ``target``, the stream of random numbers and what several ranks do are those of ``MixUp``.

    Reads: batches. Changes: inputs and targets. Stops: no. Raises SettingError for arguments that cannot be used,
    DataError for what are no floating images, and for class indices without ``classes``.
    Source: Yun et al. 2019 (arXiv:1905.04899), algorithm A1.

    >>> CutMix(classes=10).p
    1.0
    """

    def __init__(
        self, alpha: float = 1.0, *, classes: int | None = None, p: float = 1.0, inputs: Key = 0, target: Key = -1
    ) -> None:
        super().__init__(alpha, classes=classes, p=p, inputs=inputs, target=target)

    def mix(self, x: Tensor, order: Tensor, drawn: Draws, rng: torch.Generator) -> tuple[Tensor, float | Tensor]:
        if x.dim() < 3:
            raise DataError(
                f"CutMix needs images [samples, ..., height, width]; got {describe(x)}. Give them that shape in the "
                "dataset, or take lw.MixUp, which mixes any inputs"
            )
        height, width = x.shape[-2:]
        side, (across, down, _) = math.sqrt(1.0 - drawn.share), drawn.uniform
        top, bottom = _span(int(down * height), int(side * height), height)
        left, right = _span(int(across * width), int(side * width), width)
        mixed = x.clone()
        mixed[..., top:bottom, left:right] = x[..., top:bottom, left:right].index_select(0, order)
        return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)


def _span(centre: int, length: int, size: int) -> tuple[int, int]:
    """Where a stretch of ``length`` around ``centre`` begins and ends, cut off at 0 and ``size``."""
    return max(centre - length // 2, 0), min(centre + length // 2, size)
