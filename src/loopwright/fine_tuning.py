"""Fine-tuning as fastai does it: the head first, then all of it, at rates that fall from the head down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from loopwright.errors import SettingError
from loopwright.optim import groups, match_names
from loopwright.schedules import one_cycle, scaled
from loopwright.state import Run, Stage
from loopwright.task import Supervised
from loopwright.trainer import Trainer

__all__ = ["fine_tune"]


def fine_tune(
    module: nn.Module,
    train: Any,
    *,
    head: str | Sequence[str],
    epochs: int,
    valid: Any = None,
    lr: float = 2e-3,
    head_epochs: int = 1,
    spread: float = 100.0,
    layers: Sequence[str | tuple[str, ...]] = ("*",),
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.AdamW,
    trainer: Trainer | None = None,
    resume: Any = None,
    **task: Any,
) -> Run:
    """Train the ``head`` of a pretrained ``module`` with the body frozen, then all of it; returns the run.

    ``head`` holds name patterns, such as ``"fc.*"``; the body is all else. Stage "head" lasts ``head_epochs``: the body
    keeps every bit, running statistics too, and the head trains at ``lr``. Stage "all" lasts ``epochs``: the head
    trains at ``lr / 2``, the first of ``layers`` at ``lr / 2 / spread``, those between by equal factors. ``layers`` are
    patterns of the body from its input on; by default it is one layer. Both go through one cycle of the learning rate
    and of the momentum, with fastai's settings for each. Biases and norms do not decay.

    ``optimizer`` makes one of groups; ``task`` is what ``lw.Supervised`` takes besides (``loss``, ``metrics``,
    ``inputs``, ``targets``); ``trainer`` says all else, but not how long. Source: Howard & Ruder 2018
    (arXiv:1801.06146), and fastai's ``Learner.fine_tune``, whose defaults these are. It is made of ``lw.groups``,
    ``lw.schedules.one_cycle`` and two ``lw.Stage``; docs/schedules.md writes it out.

    Raises SettingError for patterns that match nothing, and numbers that cannot be.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> data = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))]
    >>> quiet = Trainer(folder=None, progress=False)
    >>> run = fine_tune(net, data, head="1.*", epochs=2, trainer=quiet)
    >>> [stage.name for stage in run.stages], run.progress.epoch
    (['head', 'all'], 3)
    """
    for name, value in (("epochs", epochs), ("head_epochs", head_epochs), ("lr", lr), ("spread", spread)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise SettingError(f"{name}={value!r}: expected a positive number")
    patterns = (head,) if isinstance(head, str) else tuple(head)
    if "*" in patterns:
        raise SettingError("head='*' leaves no body to freeze; name the head, such as head='fc.*', or use trainer.fit")
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    if trainable == match_names(patterns, trainable, what="trainable parameter"):
        raise SettingError(
            f"head={head!r} is all of {type(module).__name__} that can be trained: the body came frozen. Thaw it, "
            "module.requires_grad_(True): the stage 'head' freezes it itself. Or train the head alone with trainer.fit"
        )
    last = patterns if len(patterns) > 1 else patterns[0]
    made = groups(module, [*layers, last], lr=(lr / spread, lr), no_decay=True)
    first, then = one_cycle(1.0, rise=0.99), one_cycle(0.5, rise=0.3, div=5.0)  # times the rate of each group
    mine = [f"module.{one}" for one in patterns]
    stages = [
        Stage("head", until=f"{head_epochs} epochs", train=mine, schedule={**first, "lr": scaled(first["lr"])}),
        Stage("all", until=f"{epochs} epochs", schedule={**then, "lr": scaled(then["lr"])}),
    ]
    supervised = Supervised(module, optimizer=optimizer(made), **task)
    return (trainer or Trainer()).fit(supervised, train, valid, stages=stages, resume=resume)
