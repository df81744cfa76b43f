"""What Loopwright adds to a step, in microseconds: all contenders go over the same list of batches, as by hand.

Two numbers are taken. The mean over everything, as `measure.py` takes it, holds what comes rarely (a record, the bar)
and is the one that goals are about. Beside it stands the difference of *typical* steps, the lower quartile of single
ones: it leaves the rare out, and is steady to a few us also on a machine that is busy with other things.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import loopwright as lw
import measure
from digits import FOLDER, LR, NOTHING, Lap, parts
from measure import Goal, Prepare, Results

REPEAT = 4  # the list of batches this many times over is one epoch
Make = Callable[["Stamped"], Prepare]


class Stamped:
    """Cross entropy that notes when it is called: from one call to the next is a step."""

    def __init__(self):
        self.loss, self.at = nn.CrossEntropyLoss(), list[float]()

    def __call__(self, preds: Tensor, target: Tensor) -> Tensor:
        self.at.append(time.perf_counter())
        return self.loss(preds, target)

    def typical_us(self) -> float:
        return statistics.quantiles((b - a for a, b in zip(self.at, self.at[1:], strict=False)), n=4)[0] * 1e6


class Extra(lw.Task):
    """The digits step with ``count`` more scalars in what it returns."""

    def __init__(self, net, loss_of, optimizer, count):
        super().__init__()
        self.net, self.loss_of, self.optimizer = net, loss_of, optimizer
        self.extras = {f"extra{i}": torch.tensor(1.5) for i in range(count)}

    def training_step(self, batch):
        inputs, target = batch
        return {"loss": self.loss_of(self.net(inputs), target), **self.extras}

    def configure_optimizers(self):
        return self.optimizer


def by_hand(batches: list) -> Make:
    def make(loss_of: Stamped) -> Prepare:
        def prepare(epochs, end_of_epoch):
            net, optimizer, _ = parts()
            many = batches * REPEAT
            return measure.by_hand(net, loss_of, optimizer, many, epochs, end_of_epoch)

        return prepare

    return make


def cycle_by_hand(batches: list) -> Make:
    """One cycle of lr and momentum, as one writes it into the loop."""

    def make(loss_of: Stamped) -> Prepare:
        def prepare(epochs, end_of_epoch):
            net, optimizer, _ = parts()
            many = batches * REPEAT
            total = epochs * len(many)

            def go():
                for epoch in range(epochs):
                    for k, (inputs, target) in enumerate(many, start=epoch * len(many)):
                        done = k / total
                        if done < 0.25:
                            share = (1 + math.cos(math.pi * (done / 0.25))) / 2
                            lr, momentum = LR / 25 * share + LR * (1 - share), 0.95 * share + 0.85 * (1 - share)
                        else:
                            share = (1 + math.cos(math.pi * ((done - 0.25) / 0.75))) / 2
                            lr, momentum = LR * share + LR / 1e5 * (1 - share), 0.85 * share + 0.95 * (1 - share)
                        for group in optimizer.param_groups:
                            group["lr"], group["momentum"] = lr, momentum
                        optimizer.zero_grad()
                        loss = loss_of(net(inputs), target)
                        loss.backward()
                        optimizer.step()
                    end_of_epoch()
                return net

            return go

        return prepare

    return make


def ours(batches: list, *, accuracy=False, extras=None, short=False, idle=0, schedule=None, **options) -> Make:
    """``short``: epochs of the list once, REPEAT of them in place of one; ``idle``: so many callbacks with no hook."""
    many, every = (batches, REPEAT) if short else (batches * REPEAT, 1)

    def make(loss_of: Stamped) -> Prepare:
        def prepare(epochs, end_of_epoch):
            net, optimizer, _ = parts()
            callbacks = [Lap(end_of_epoch, every), *(lw.Callback() for _ in range(idle))]

            def go():
                metrics = {"accuracy": lw.metrics.Accuracy()} if accuracy else None
                task = (
                    lw.Supervised(net, loss=loss_of, optimizer=optimizer, metrics=metrics, schedule=schedule)
                    if extras is None
                    else Extra(net, loss_of, optimizer, extras)
                )
                lw.Trainer(epochs=epochs * every, callbacks=callbacks, **options).fit(task, train=many)
                return net

            return go

        return prepare

    return make


class Race:
    """Contenders side by side, their means and their typical steps."""

    def __init__(self, options, steps: int, **makers: Make):
        losses = {name: Stamped() for name in makers}
        laps, rounds = (12, 3) if options.quick else (75, 9)
        with measure.terminal():
            self.results: Results = measure.race(
                {name: make(losses[name]) for name, make in makers.items()},
                laps=laps,
                chunk=1,
                steps_per_epoch=steps,
                rounds=rounds,
                clock=measure.clock_of(options),
            )
        self.typical = {name: loss.typical_us() for name, loss in losses.items()}

    def extra(self, what: str, name: str, over: str, limit: float | None = None, parts: int = 1) -> Goal:
        """How much more ``name`` takes a step; divided by ``parts``, such as the scalars it has more."""
        note = (
            f"{self.results.spread_us(name, over, parts)}; a typical step "
            f"{(self.typical[name] - self.typical[over]) / parts:+.1f} to {self.typical[over]:.0f}"
        )
        return Goal(what, self.results.extra_us(name, over) / parts, "us", limit, note)


def step_costs(options) -> Iterable[Goal]:
    batches = [list(batch) for batch in parts()[2]]
    steps, on = len(batches) * REPEAT, {"folder": FOLDER, "accuracy": True}

    off, full = (
        Race(
            options,
            steps,
            hand=by_hand(batches),
            ours=ours(batches, **settings),
            idle=ours(batches, idle=20, **settings),
        )
        for settings in (NOTHING, on)
    )
    for race in (off, full):
        assert race.results.same_bits("ours", "hand"), "the weights are not those of the loop by hand"
    yield Goal("the step by hand, batches preloaded", off.results.step_us("hand"), "us", note="how fast the machine is")
    yield off.extra("ours over the same step by hand, nothing enabled", "ours", "hand", 8)
    yield full.extra("ours over the same step by hand, defaults", "ours", "hand", 28)
    yield off.extra("20 callbacks that override nothing, a step, nothing enabled", "idle", "ours", 8)
    yield full.extra("20 callbacks that override nothing, a step, defaults", "idle", "ours", 8)

    cycle = lw.schedules.one_cycle(LR)
    race = Race(
        options,
        steps,
        hand=by_hand(batches),
        hand_cycle=cycle_by_hand(batches),
        plain=ours(batches, **NOTHING),
        cycle=ours(batches, schedule=cycle, **NOTHING),
    )
    assert race.results.same_bits("cycle", "hand_cycle"), "the schedules are not those by hand"
    extra = race.results.extra_us("cycle", "plain") - race.results.extra_us("hand_cycle", "hand")
    typical = race.typical["cycle"] - race.typical["plain"] - race.typical["hand_cycle"] + race.typical["hand"]
    note = f"a typical step {typical:+.1f}; by hand it costs {race.typical['hand_cycle'] - race.typical['hand']:.1f}"
    yield Goal("one cycle of lr and momentum over the same by hand, a step", extra, "us", 10, note)

    epochs = Race(options, steps, long=ours(batches, **on), short=ours(batches, short=True, **on)).results
    end_us = epochs.extra_us("short", "long") * steps / (REPEAT - 1)
    yield Goal("an epoch's end, defaults (its record, its line)", end_us, "us")
    for name, settings in (("defaults", {"folder": FOLDER}), ("nothing enabled", NOTHING)):
        few, many = ours(batches, extras=1, **settings), ours(batches, extras=9, **settings)
        race = Race(options, steps, one=few, nine=many)
        yield race.extra(f"one more scalar a step, {name}", "nine", "one", 2, parts=8)
