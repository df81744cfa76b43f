"""The digits benchmark: one small network and the ways to train it, each a contender for ``measure.race``.

scikit-learn's digits, 64-64-10, batch 64, SGD with momentum, cross entropy: small on purpose, since only there the loop
itself can be seen.
"""

from __future__ import annotations

import contextlib
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from measure import EndOfEpoch, by_hand

with contextlib.suppress(ModuleNotFoundError):  # the other frameworks can be measured without ours
    import loopwright as lw

BATCH, LR, MOMENTUM = 64, 0.1, 0.9
NOTHING = dict(progress=False, loggers=(), folder=None, checkpoint=False, nonfinite=None)
FOLDER = tempfile.mkdtemp(prefix="loopwright-benchmark-")


def load() -> tuple[torch.Tensor, torch.Tensor]:
    inputs, target = load_digits(return_X_y=True)
    return torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(target)


def parts(fused: bool = False) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    """A fresh network, optimizer and loader, the same ones every time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, fused=fused or None)
    return net, optimizer, DataLoader(TensorDataset(*DIGITS), BATCH, shuffle=True)


DIGITS = load()
STEPS = len(parts()[2])  # of one epoch


def hand(epochs: int, end_of_epoch: EndOfEpoch):
    net, optimizer, loader = parts()
    loss_of = nn.CrossEntropyLoss()

    return by_hand(net, loss_of, optimizer, loader, epochs, end_of_epoch)


def expert(fused: bool):
    """As fast as eager PyTorch goes when someone who knows how gives up comfort: no loader, no zero_grad."""

    def prepare(epochs: int, end_of_epoch: EndOfEpoch):
        net, optimizer, _ = parts(fused)
        loss_of, parameters, (inputs, target) = nn.CrossEntropyLoss(), list(net.parameters()), DIGITS

        def go():
            for _ in range(epochs):
                for index in torch.randperm(len(inputs)).split(BATCH):
                    for parameter in parameters:
                        parameter.grad = None
                    loss_of(net(inputs[index]), target[index]).backward()
                    optimizer.step()
                end_of_epoch()
            return net

        return go

    return prepare


class Lap(lw.Callback):
    """Tells the race that an epoch has ended (every so many epochs of ours may be one of the race)."""

    def __init__(self, end_of_epoch: EndOfEpoch, every: int = 1):
        self.end_of_epoch, self.every = end_of_epoch, every

    def on_epoch_end(self, run):
        if run.progress.epoch % self.every == 0:
            self.end_of_epoch()


def loopwright(fused: bool = False, valid: bool = False, off: bool = False, guards: bool = True):
    """As the README shows it, with everything that is on by default, or with everything off.

    Without ``guards`` nothing is checked or kept for the case that a step goes wrong; the rest of the defaults is on.
    """

    def prepare(epochs: int, end_of_epoch: EndOfEpoch):
        net, optimizer, loader = parts(fused)
        metrics = None if off else {"accuracy": lw.metrics.Accuracy()}
        valid_loader = DataLoader(TensorDataset(*DIGITS), BATCH) if valid else None
        options = NOTHING if off else {"folder": FOLDER}
        if not guards:
            options |= {"nonfinite": None, "capsule": False}

        def go():
            task = lw.Supervised(net, loss=nn.CrossEntropyLoss(), optimizer=optimizer, metrics=metrics)
            trainer = lw.Trainer(epochs=epochs, callbacks=[Lap(end_of_epoch)], **options)
            trainer.fit(task, train=loader, valid=valid_loader)
            return net

        return go

    return prepare
