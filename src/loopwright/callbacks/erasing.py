"""Random erasing: a rectangle of each image is overwritten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopwright.callbacks.draws import Draws
from loopwright.callbacks.parts import Key, floats, with_parts
from loopwright.errors import DataError, SettingError
from loopwright.events import Callback, describe
from loopwright.state import Run

__all__ = ["RandomErasing"]

_TRIES, _ROUNDS = 16, 64  # rectangles drawn at a time, and how often, until one lies inside of the image


class RandomErasing(Callback):
    """Overwrites a rectangle of each image with probability ``p``, on the device.

    Images are ``[samples, ..., height, width]``. Its area is uniform in ``scale`` (shares of the image), its height
    over width uniform in ``ratio``, its corner uniform in the image; as in the paper all is drawn again until it lies
    inside. ``value`` takes its place: a number, one for each channel, or ``"noise"``, standard normal, for images that
    are normalised (the paper's are not: it draws from 0 to 255).

    The draws depend on (key of the run, epoch, batch) alone, as those of ``MixUp``; with several ranks each draws for
    its own slice. Validation sees whole images.

    Reads: batches. Changes: inputs. Stops: no. Raises SettingError for arguments that cannot be used, DataError for
    what are no floating images, and for a scale and ratio that do not fit into them.
    Source: Zhong et al. 2017 (arXiv:1708.04896), algorithm 1, whose values are the defaults.

    >>> RandomErasing(0.25, value=0.0).scale
    (0.02, 0.4)
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        scale: tuple[float, float] = (0.02, 0.4),
        ratio: tuple[float, float] = (0.3, 1 / 0.3),
        value: float | tuple[float, ...] | str = "noise",
        inputs: Key = 0,
    ) -> None:
        if not 0 < p <= 1:
            raise SettingError(f"RandomErasing(p={p!r}): expected a probability above 0 and at most 1")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise SettingError(f"RandomErasing(scale={scale!r}): expected shares of the image, 0 < low <= high <= 1")
        if not 0 < ratio[0] <= ratio[1]:
            raise SettingError(f"RandomErasing(ratio={ratio!r}): expected two numbers, 0 < low <= high")
        if isinstance(value, str) and value != "noise":
            raise SettingError(f"RandomErasing(value={value!r}): expected a number, one for each channel, or 'noise'")
        self.p, self.scale, self.ratio, self.value, self.inputs = p, scale, ratio, value, inputs
        self._draws = Draws()

    def on_fit_start(self, run: Run) -> None:
        self._draws.begin(run, self)

    def map_batch(self, run: Run, batch: Any) -> Any:
        rng = self._draws.next(run)
        x = floats(batch, self.inputs, "RandomErasing")
        if x.dim() < 3:
            raise DataError(
                f"RandomErasing needs images [samples, ..., height, width]; got {describe(x)}. Give them that shape in "
                "the dataset, or leave it out"
            )
        box = self._boxes(x, rng).to(x.device, non_blocking=True)  # [samples, 4]: top, bottom, left, right
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
        inside_rows = (rows >= box[:, 0, None]) & (rows < box[:, 1, None])
        inside_columns = (columns >= box[:, 2, None]) & (columns < box[:, 3, None])
        mask = inside_rows[:, :, None] & inside_columns[:, None, :]
        mask = mask.view(len(x), *[1] * (x.dim() - 3), *x.shape[-2:])
        return with_parts(batch, {self.inputs: torch.where(mask, self._filling(x, rng), x)})

    def _boxes(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """For each sample the rectangle to erase; an empty one where nothing is."""
        height, width = x.shape[-2:]
        found = torch.zeros(len(x), 4, dtype=torch.long)
        left = (torch.rand(len(x), generator=rng) < self.p).nonzero().flatten()
        for _ in range(_ROUNDS):
            if not len(left):
                return found
            area, ratio, down, across = torch.rand(4, len(left), _TRIES, generator=rng, dtype=torch.float64)
            area = (self.scale[0] + area * (self.scale[1] - self.scale[0])) * height * width
            ratio = self.ratio[0] + ratio * (self.ratio[1] - self.ratio[0])
            tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
            top, begin = (down * height).floor(), (across * width).floor()
            fits = (top + tall <= height) & (begin + wide <= width)
            first = fits.to(torch.uint8).argmax(1, keepdim=True)  # the first that fits
            boxes = torch.stack([top, top + tall, begin, begin + wide], 2)
            chosen = boxes.gather(1, first.unsqueeze(2).expand(-1, 1, 4)).squeeze(1).long()
            done = fits.any(1)
            found[left[done]] = chosen[done]
            left = left[~done]
        raise DataError(
            f"RandomErasing(scale={self.scale}, ratio={self.ratio}): of {_TRIES * _ROUNDS} such rectangles none lies "
            f"inside of an image of {height} x {width}; ask for smaller ones"
        )

    def _filling(self, x: Tensor, rng: torch.Generator) -> Tensor:
        if self.value == "noise":
            return torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device, non_blocking=True)
        value = torch.as_tensor(self.value, dtype=x.dtype, device=x.device)
        return value.view(-1, 1, 1) if value.dim() else value
