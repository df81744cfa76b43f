"""The kinds of training whose resume is tried: each makes all objects of a run of 96 steps anew, as a script does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import loopwright as lw
from reliability.parts import (
    CLASSES,
    FEATURES,
    Buckets,
    Counting,
    Ema,
    Gan,
    Ledger,
    Noisy,
    Pooled,
    Ragged,
    Recurrent,
    Shards,
    Walks,
    arrays,
    mlp,
    pad,
)

STEPS, PER_EPOCH, BATCH = 96, 32, 5
N = PER_EPOCH * BATCH - 3  # the last batch of an epoch is short


@dataclass
class Parts:
    """All that a run of a variant needs. ``once``: every id comes once an epoch."""

    task: Any
    train: Any
    valid: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    stages: Any = None
    batches: int = PER_EPOCH  # in an epoch
    once: bool = True


Make = Callable[[Ledger], Parts]
VARIANTS: dict[str, Make] = {}
EXTRAS: dict[str, Make] = {}


def variant(name: str, into: dict[str, Make] = VARIANTS) -> Callable[[Make], Make]:
    """Register a function that makes the parts of a run."""

    def register(make: Make) -> Make:
        into[name] = make
        return make

    return register


def supervised(net: nn.Module, ledger: Ledger, optimizer: Any = None, **settings: Any) -> lw.Supervised:
    optimizer = optimizer or torch.optim.AdamW(net.parameters(), lr=0.01)
    return lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, inputs=ledger.inputs, targets=1, **settings)


def tensors(n: int = N, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*arrays(n)), **{"batch_size": BATCH, "shuffle": True, **settings})


def noisy(n: int = N, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(n), **{"batch_size": BATCH, "shuffle": True, **settings})


def accuracy() -> dict[str, Any]:
    return {"accuracy": lw.metrics.Accuracy()}


def several() -> dict[str, Any]:
    one = lw.metrics.Accuracy()
    modes = {"running": lw.metrics.Running(one), "window": lw.metrics.Window(one, 3)}
    chosen = {"where": lw.metrics.Where(one, _odd), "by": lw.metrics.Grouped(one, by="target")}
    return {"accuracy": one, "gain": 2 * one - 1, **modes, **chosen}


def _odd(target: Any) -> Any:
    return target % 2 == 1


@variant("plain")
def _plain(ledger: Ledger) -> Parts:
    return Parts(supervised(mlp(), ledger), tensors())


@variant("dropout and batch norm")
def _dropout(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.3, batch_norm=True)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    schedule = lw.per_step(lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=STEPS))
    return Parts(supervised(net, ledger, sgd, schedule=schedule, metrics=several()), tensors(), tensors(20))


def _augmented(workers: int, **settings: Any) -> Make:
    def make(ledger: Ledger) -> Parts:
        net = mlp(dropout=0.2)
        return Parts(supervised(net, ledger, metrics=accuracy()), noisy(num_workers=workers, **settings), noisy(11))

    return make


for _workers in (0, 2, 4):
    VARIANTS[f"augmentation, {_workers} workers"] = _augmented(_workers)


@variant("accumulation 4, killed inside a window")
def _accumulation(ledger: Ledger) -> Parts:
    batches = 4 * PER_EPOCH - 2  # the last window of an epoch is short
    net = mlp(dropout=0.2, batch_norm=True)
    return Parts(
        supervised(net, ledger, metrics=accuracy()), noisy(batches * BATCH - 2), settings={"accumulate": 4},
        batches=batches,
    )  # fmt: skip


@variant("two optimizers")
def _gan(ledger: Ledger) -> Parts:
    return Parts(Gan(ledger), noisy())


@variant("plateau scheduler")
def _plateau(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.2)
    adam = torch.optim.Adam(net.parameters(), lr=0.2)
    schedule = lr_scheduler.ReduceLROnPlateau(adam, patience=0, threshold=0.5)
    return Parts(supervised(net, ledger, adam, schedule=schedule), tensors(), tensors(23, batch_size=4))


@variant("moving average of the weights")
def _ema(ledger: Ledger) -> Parts:
    return Parts(supervised(mlp(dropout=0.2), ledger), tensors(), settings={"callbacks": [Ema()]})


@variant("sharded stream")
def _sharded(ledger: Ledger) -> Parts:
    return Parts(supervised(mlp(dropout=0.2), ledger), DataLoader(Shards(N), batch_size=BATCH))


@variant("weighted sampler")
def _weighted(ledger: Ledger) -> Parts:
    sampler = WeightedRandomSampler(torch.linspace(0.1, 1, N).tolist(), N)
    return Parts(supervised(mlp(), ledger), noisy(sampler=sampler, shuffle=False), once=False)


@variant("batches of variable length")
def _ragged(ledger: Ledger) -> Parts:
    data = Ragged(N)
    loader = DataLoader(data, batch_sampler=Buckets(data.lengths, BATCH), collate_fn=pad)
    return Parts(supervised(Pooled(), ledger, metrics=accuracy()), loader)


@variant("validation inside epochs")
def _validation(ledger: Ledger) -> Parts:
    task = supervised(mlp(dropout=0.2, batch_norm=True), ledger, metrics=accuracy())
    return Parts(task, noisy(), noisy(13, batch_size=4), {"validate_every": "7 steps"})


class _Watched(lw.Supervised):
    """Its validation gets better until step 64, and worse from there on."""

    def validation_step(self, batch: Any) -> dict[str, Any]:
        away: Any = (self.module.count - 64).abs()
        return {**super().training_step(batch), "away": away.float()}


@variant("early stop")
def _early(ledger: Ledger) -> Parts:
    net = Counting()
    adam = torch.optim.AdamW(net.parameters(), lr=0.01)
    task = _Watched(net, nn.CrossEntropyLoss(), adam, inputs=ledger.inputs, targets=1)
    stop = lw.EarlyStopping("valid/away", mode="min", patience=4)  # after steps 72, 80, 88, 96
    return Parts(task, tensors(), tensors(9), {"epochs": 9, "validate_every": "8 steps", "callbacks": [stop]})


# ------------------------------------------------------------------------------------------- beyond the twelve


@variant("our own loader", EXTRAS)
def _own(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.2)
    return Parts(supervised(net, ledger, metrics=accuracy()), lw.Loader(arrays(N), BATCH, shuffle=True))


def _transform(sample: Any) -> Any:
    x, y, i = sample
    return x + torch.rand(FEATURES) + random.random() + float(np.random.rand()), y, i


def _own_workers(workers: int) -> Make:
    def make(ledger: Ledger) -> Parts:
        data = TensorDataset(*arrays(N))
        loader = lw.Loader(data, BATCH, shuffle=True, transform=_transform, workers=workers)
        return Parts(supervised(mlp(dropout=0.2), ledger, metrics=accuracy()), loader)

    return make


for _workers in (0, 2):
    EXTRAS[f"our own loader, augmentation, {_workers} workers"] = _own_workers(_workers)


EXTRAS["augmentation, 2 persistent workers"] = _augmented(2, persistent_workers=True, prefetch_factor=3)


@variant("a generator of the loader's own", EXTRAS)
def _generator(ledger: Ledger) -> Parts:
    generator = torch.Generator().manual_seed(torch.initial_seed() % 1000)
    return Parts(supervised(mlp(dropout=0.2), ledger), noisy(generator=generator))


@variant("a stream whose epochs end with a full batch", EXTRAS)
def _full(ledger: Ledger) -> Parts:
    return Parts(supervised(mlp(), ledger), DataLoader(Shards(PER_EPOCH * BATCH), batch_size=BATCH))


@variant("three stages", EXTRAS)
def _stages(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.2)
    stages = [
        lw.Stage("head", until="40 steps", train="module.3.*"),
        lw.Stage("all", until="1 epoch", accumulate=2, source=noisy(2 * N)),
        lw.Stage("last", until="24 steps", freeze="module.0.*"),
    ]
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.AdamW(net.parameters(), lr=0.01),
                         inputs=ledger.inputs, targets=1)  # fmt: skip
    return Parts(task, noisy(), tensors(9), {"epochs": None}, stages=stages, batches=0, once=False)


@variant("schedules by group, an annealed dropout, frozen stages", EXTRAS)
def _scheduled(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.3, batch_norm=True)
    adam = torch.optim.AdamW(lw.groups(net, ["0.*", "*"], lr=(0.005, 0.02), no_decay=True))
    stages = [
        lw.Stage("head", until="1 epoch", freeze=["module.0.*", "module.1.*"]),
        lw.Stage(
            "all", until="2 epochs", schedule={"lr": lw.schedules.warmup(lw.schedules.cosine(0.02, 0.0), "9 steps")}
        ),
    ]
    task = supervised(net, ledger, adam, schedule=lw.schedules.one_cycle(), metrics=accuracy())
    dropout = next(name for name, module in task.named_modules() if isinstance(module, nn.Dropout))
    anneal = lw.Anneal({f"{dropout}.p": lw.schedules.linear(0.0, 0.5)})
    return Parts(task, noisy(), tensors(9), {"epochs": None, "callbacks": [anneal]}, stages=stages)


@variant("intervals and ends of several units", EXTRAS)
def _units(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.3, batch_norm=True)
    often = {"validate_every": "at 10% | 11 steps & after 40 batches", "log_every": "7 batches | at 0.5 epochs"}
    stages = [
        lw.Stage("first", until="35 steps & 1 epoch | 40 steps"),
        lw.Stage("last", until="1 epoch & 61 steps", lr=lw.schedules.warmup(0.02, "9 steps | 10%")),
    ]
    task = supervised(net, ledger, metrics=accuracy())
    return Parts(task, noisy(), noisy(9), {"epochs": None, **often}, stages=stages, batches=0, once=False)


@variant("stages with a plateau", EXTRAS)
def _plateaus(ledger: Ledger) -> Parts:
    net = Counting()
    adam = torch.optim.AdamW(net.parameters(), lr=0.01)
    task = _Watched(net, nn.CrossEntropyLoss(), adam, inputs=ledger.inputs, targets=1)
    best, plateau = lw.KeepBest("valid/away", mode="min"), lw.Plateau("valid/away", mode="min", patience=2)
    stages = [  # the best is after step 64, the plateau after 80
        lw.Stage("first", until=["9 epochs", plateau], validate_every="8 steps", callbacks=[best]),
        lw.Stage(
            "second", until="16 steps", optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), callbacks=[Ema()]
        ),
    ]
    return Parts(task, noisy(), tensors(9), {"epochs": None}, stages=stages, batches=0, once=False)


@variant("truncated back-propagation", EXTRAS)
def _truncated(ledger: Ledger) -> Parts:
    net = Recurrent()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    task = lw.Supervised(net, nn.MSELoss(), adam, inputs=ledger.inputs, targets=1, truncate=4)
    return Parts(task, DataLoader(Walks(80), BATCH, shuffle=True), settings={"epochs": 2}, batches=0, once=False)


@variant("accumulation by samples that changes", EXTRAS)
def _by_samples(ledger: Ledger) -> Parts:
    settings = {"epochs": None, "steps": STEPS, "accumulate": [(0, 1), (20, "12 samples"), (60, 2)]}
    return Parts(
        supervised(mlp(dropout=0.2), ledger, metrics=accuracy()), noisy(), None, settings, batches=0, once=False
    )


def _noise(batch: Any, rng: torch.Generator) -> Any:
    return [batch[0] + 0.1 * torch.randn(batch[0].shape, generator=rng), *batch[1:]]


@variant("batches mixed and transformed, a penalty, the best weights kept", EXTRAS)
def _callbacks(ledger: Ledger) -> Parts:
    callbacks = [
        lw.BatchTransform(_noise), lw.MixUp(classes=CLASSES, target=1), lw.Penalty("l1", 0.001),
        lw.EarlyStopping("valid/loss", patience=99, restore="best"),
    ]  # fmt: skip
    settings = {"callbacks": callbacks, "validate_every": "5 steps"}
    return Parts(supervised(mlp(dropout=0.2), ledger), tensors(), tensors(9), settings)


def _images(batch: Any) -> Any:
    return [batch[0].view(-1, 1, 2, FEATURES // 2), *batch[1:]]


@variant("oversampling, batches erased and cut, a schedule on dropout", EXTRAS)
def _images_cut(ledger: Ledger) -> Parts:
    net = nn.Sequential(nn.Flatten(), mlp(dropout=0.2))
    (dropout,) = (name for name, module in net.named_modules() if isinstance(module, nn.Dropout))
    callbacks = [
        lw.BatchTransform(_images), lw.RandomErasing(scale=(0.1, 0.5)), lw.CutMix(classes=CLASSES, target=1),
        lw.Anneal({f"module.{dropout}.p": lw.schedules.cosine(0.5, 0.0)}),
    ]  # fmt: skip
    data = arrays(N)
    sampler = lw.data.WeightedSampler.balanced(data[1], BATCH, samples=N)
    return Parts(
        supervised(net, ledger), lw.Loader(data, sampler=sampler), settings={"callbacks": callbacks}, once=False
    )


@variant("a function of the user", EXTRAS)
def _function(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    box = {"n": 0}

    def step(run: lw.Run, batch: Any) -> Any:
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(ledger.inputs(batch)), batch[1])
        loss.backward()
        sgd.step()
        box["n"] += 1
        return {"loss": loss.detach(), "n": box["n"]}

    state = {"net": net, "sgd": sgd, "box": (lambda: dict(box), box.update)}
    return Parts((step, state), noisy())


class _Noted(lw.Callback):
    """Notes the batches of a step that goes over them twice."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        self.ledger.note(batch[2])
        return batch


@variant("sharpness-aware minimization", EXTRAS)
def _sam(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.2, batch_norm=True)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.AdamW(net.parameters(), 0.01), inputs=0, targets=1)
    return Parts(task, noisy(), settings={"callbacks": [lw.SAM(), _Noted(ledger)]})


@variant("Lookahead around RAdam, of step functions", EXTRAS)
def _ranger(ledger: Ledger) -> Parts:
    net = mlp(dropout=0.2)
    steps = lw.optim.lookahead(lw.optim.decay, lw.optim.radam)
    return Parts(supervised(net, ledger, lw.optim.Stepwise(net.parameters(), steps, lr=0.01)), noisy())


@variant("EMA, seen by validation", EXTRAS)
def _lw_ema(ledger: Ledger) -> Parts:
    task = supervised(mlp(dropout=0.2, batch_norm=True), ledger, metrics=accuracy())
    ema = lw.EMA(0.9, buffers=True, warmup=True)
    return Parts(task, noisy(), noisy(13, batch_size=4), {"validate_every": "7 steps", "callbacks": [ema]})


@variant("SWA, batch norm measured before each validation", EXTRAS)
def _swa(ledger: Ledger) -> Parts:
    task = supervised(mlp(dropout=0.2, batch_norm=True), ledger, metrics=accuracy())
    swa = lw.SWA("1 epoch", batch_norm=noisy(25))
    return Parts(task, noisy(), noisy(13, batch_size=4), {"callbacks": [swa]})


@variant("fp16 with a scaler of the loss", EXTRAS)
def _fp16(ledger: Ledger) -> Parts:
    settings = {"precision": "fp16", "clip_norm": 1.0}
    return Parts(supervised(mlp(dropout=0.2), ledger, metrics=accuracy()), noisy(), settings=settings)


@variant("LBFGS, which calls a closure", EXTRAS)
def _lbfgs(ledger: Ledger) -> Parts:
    net = mlp()
    lbfgs = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=2, history_size=3)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), lbfgs, inputs=0, targets=1)
    return Parts(task, noisy(), settings={"callbacks": [_Noted(ledger)]})


@variant("a mix of sources, cut and of a set length, with our samplers", EXTRAS)
def _mix(ledger: Ledger) -> Parts:
    lengths = torch.arange(N) % 7 + 1
    weighted = lw.Loader(arrays(N), sampler=lw.data.WeightedSampler(torch.linspace(0.1, 1, N), BATCH))
    bucketed = lw.Loader(arrays(N), sampler=lw.data.BucketSampler(lengths, BATCH, buckets=4))
    sources = {"a": weighted, "b": lw.data.limit(bucketed, batches=9), "c": noisy()}
    data = lw.data.epoch_length(lw.data.Mix(sources, weights={"a": 1, "b": 1, "c": 2}), PER_EPOCH)
    return Parts(supervised(mlp(dropout=0.2), ledger, metrics=accuracy()), data, once=False)


def _image(batch: Any, rng: torch.Generator) -> Any:
    return [batch[0].reshape(-1, 1, 2, 3), *batch[1:]]


@variant("images cut together and erased, watched", EXTRAS)
def _watched_images(ledger: Ledger) -> Parts:
    callbacks = [
        lw.BatchTransform(_image), lw.CutMix(classes=CLASSES, target=1), lw.RandomErasing(0.7), lw.Watch("gradients"),
    ]  # fmt: skip
    net = nn.Sequential(nn.Flatten(), *mlp(dropout=0.2))
    return Parts(supervised(net, ledger), tensors(), tensors(9), {"callbacks": callbacks, "validate_every": "5 steps"})


__all__ = ["CLASSES", "EXTRAS", "FEATURES", "STEPS", "VARIANTS", "Make", "Parts"]
