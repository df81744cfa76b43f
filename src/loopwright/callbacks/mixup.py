"""MixUp: train on mixtures of two samples and of their targets."""

from __future__ import annotations

import torch
from torch import Tensor

from loopwright.callbacks.draws import Draws, betas
from loopwright.callbacks.mixing import Mixing, mixed
from loopwright.callbacks.parts import Key

__all__ = ["MixUp"]


class MixUp(Mixing):
    """Replaces each sample by ``share * x[i] + (1 - share) * x[j]`` and its target alike; j comes from a permutation.

    ``share`` is drawn from Beta(alpha, alpha), once a batch as in the authors' code, with ``per_sample=True`` for each
    sample. ``classes``: how many classes there are, where targets are class indices: they become soft targets
    (float, ``[samples, classes]``), and the loss must take these, as ``nn.CrossEntropyLoss`` does. Floating targets are
    mixed themselves. Metrics of training are fed the class with the larger share, so that accuracy stays defined.
    ``p``: the share of batches that are mixed. ``inputs`` and ``target`` name what to mix in a batch, by position or
    key.

    The draws depend on (key of the run, epoch, batch) alone: the global generators and the order of the data are left
    as they are, and a resumed run mixes as it would have. With several ranks each mixes its own slice of a batch, with
    a share of its own. Validation sees whole samples. Callbacks work in the order of their list: with CutMix after it,
    mixtures are cut.

    ``alpha`` may follow a schedule: ``Anneal({"alpha": schedule}, of=mixup)``; at 0 nothing is mixed.

    Reads: batches. Changes: inputs and targets. Stops: no. Raises SettingError for arguments that cannot be used,
    DataError for inputs that are not floating, and for class indices without ``classes``.
    Source: Zhang et al. 2018 (arXiv:1710.09412), eq. 1; ``p`` and ``per_sample`` are not in it.

    >>> MixUp(0.4, classes=10).alpha
    0.4
    """

    def __init__(
        self,
        alpha: float = 0.4,
        *,
        classes: int | None = None,
        per_sample: bool = False,
        p: float = 1.0,
        inputs: Key = 0,
        target: Key = -1,
    ) -> None:
        super().__init__(alpha, classes=classes, p=p, inputs=inputs, target=target)
        self.per_sample = per_sample

    def mix(self, x: Tensor, order: Tensor, drawn: Draws, rng: torch.Generator) -> tuple[Tensor, float | Tensor]:
        share = betas(len(x), self.alpha, rng) if self.per_sample else drawn.share
        return mixed(x, order, share), share
