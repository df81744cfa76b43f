"""What a callback costs in a step over the same thing written by hand: ``python benchmarks/callbacks.py --write``.

Its hooks are called as the loop calls them, with batches of 64 images of 8 x 8, and beside them what people write into
their step; both again and again by turns. The fastest of many rounds counts: it is steady also on a machine that other
work shares. Where a callback draws random numbers, by hand they come from the global generators.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import loopwright as lw
import measure
from loopwright.events import fire, fold
from measure import Goal

LIMIT_US, CLASSES, SIZE = 10.0, 10, 64


def one_hot(target: Tensor) -> Tensor:
    return torch.zeros(len(target), CLASSES).scatter_(1, target.unsqueeze(1), 1.0)


def mixup(batch: Any) -> Any:
    inputs, target = batch
    share, order, soft = float(np.random.beta(0.4, 0.4)), torch.randperm(len(inputs)), one_hot(target)
    return torch.lerp(inputs[order], inputs, share), torch.lerp(soft[order], soft, share)


def cutmix(batch: Any) -> Any:
    inputs, target = batch
    share, order, soft = float(np.random.beta(1.0, 1.0)), torch.randperm(len(inputs)), one_hot(target)
    side, (across, down) = (1 - share) ** 0.5, np.random.random(2)
    top, left, half = int(down * 8), int(across * 8), int(side * 8) // 2
    rows, columns = slice(max(top - half, 0), min(top + half, 8)), slice(max(left - half, 0), min(left + half, 8))
    mixed = inputs.clone()
    mixed[..., rows, columns] = inputs[..., rows, columns][order]
    share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / 64
    return mixed, torch.lerp(soft[order], soft, share)


def erased(batch: Any) -> Any:
    """A rectangle of half of the images, one image after another."""
    inputs = batch[0].clone()
    for image in inputs:
        erases = np.random.random() < 0.5
        while erases:
            area, ratio = np.random.uniform(0.02, 0.4) * 64, np.random.uniform(0.3, 1 / 0.3)
            tall, wide = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if tall <= 8 and wide <= 8:
                top, left = np.random.randint(0, 9 - tall), np.random.randint(0, 9 - wide)
                image[:, top : top + tall, left : left + wide] = torch.randn(1, tall, wide)
                erases = False
    return inputs, batch[1]


def noise(batch: Any) -> Any:
    return batch[0] + torch.randn(batch[0].shape), batch[1]


def own_noise(batch: Any, rng: torch.Generator) -> Any:
    return batch[0] + torch.randn(batch[0].shape, generator=rng), batch[1]


class Rate:
    """Samples a second each 50 steps, by hand."""

    def __init__(self):
        self.seen, self.last, self.count = 0, time.perf_counter(), 0

    def __call__(self, batch: Any) -> None:
        self.seen, self.count = self.seen + SIZE, self.count + 1
        if self.count % 50 == 0:
            now = time.perf_counter()
            self.rate, self.seen, self.last = self.seen / (now - self.last), 0, now


def fitted(callback: lw.Callback, net: nn.Module, batch: Any) -> lw.Run:
    """A run in which the callback has begun."""
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = lw.Trainer(epochs=1, callbacks=[callback], folder=None, progress=False)
    return trainer.fit(lw.Supervised(net, nn.CrossEntropyLoss(), sgd), [batch], [batch])


def hooks_of(callback: lw.Callback, net: nn.Module, batch: Any) -> Callable[[], None]:
    """A step as the callback sees it."""
    run = fitted(callback, net, batch)
    stage, hooks = run.stages[0], run.hooks
    phase, run.progress = stage.phases[0], run.progress._replace(stage=0)
    result = lw.StepResult({}, None, float(SIZE))
    output = {"loss": torch.zeros((), requires_grad=True) * 1.0, "preds": None, "target": None}

    def step() -> None:
        run.progress = run.progress._replace(step=run.progress.step + 1)
        if hooks.on_step_start:
            fire(hooks.on_step_start, run)
        if hooks.on_batch_start:
            fire(hooks.on_batch_start, run, batch)
        if hooks.map_batch:
            fold(hooks.map_batch, run, batch)
        if hooks.map_output:
            fold(hooks.map_output, run, output, batch, phase)
        if hooks.on_step_end:
            fire(hooks.on_step_end, run, result)
        run.series._rows.clear()

    return step


class StateKept(lw.Callback):
    """By hand: what a step that fails is to be made again from."""

    def on_step_start(self, run: lw.Run) -> None:
        self.kept = run.window, run.progress, torch.get_rng_state()


class DropoutSet(lw.Callback):
    """By hand: a dropout rate that rises with the steps."""

    def on_step_start(self, run: lw.Run) -> None:
        run.task.module[2].p = 0.1 + 0.4 * run.progress.step / 5000


class GeneratorSeeded(lw.Callback):
    """By hand: a stream of random numbers for each batch."""

    rng = torch.Generator()

    def map_batch(self, run: lw.Run, batch: Any) -> Any:
        self.rng.manual_seed(run.progress.batch + 10**6 * run.progress.epoch)
        return batch


class Clock(lw.Callback):
    """Times every call of the hooks of one callback in a run."""

    def __init__(self, kind: type) -> None:
        self.kind, self.found = kind, dict[str, list[float]]()

    def on_fit_start(self, run: lw.Run) -> None:
        run.hooks.wrap(self._timed)

    def _timed(self, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if type(getattr(function, "__self__", None)) is not self.kind:
            return function
        found, clock = self.found.setdefault(hook, []), time.perf_counter

        def timed(*args: Any) -> Any:
            began = clock()
            returned = function(*args)
            found.append(clock() - began)
            return returned

        return timed


def in_a_run(callback: lw.Callback, batch: Any, steps: int) -> float | None:
    """What the hooks of ``callback`` take in a typical step of a run, in us: the lower quartile of each, added up.

    None where no hook of it is called in each step: what it takes then is no part of a typical one.
    """
    with tempfile.TemporaryDirectory() as folder:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Dropout(0.1), nn.Linear(64, CLASSES))
        sgd, clock = torch.optim.SGD(net.parameters(), lr=0.01), Clock(type(callback))
        settings = {"checkpoint": False, "loggers": [], "progress": False, "capsule": False, "folder": folder}
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, metrics={"accuracy": lw.metrics.Accuracy()})
        lw.Trainer(steps=steps, callbacks=[callback, clock], **settings).fit(task, [batch] * 500, [batch])
    quartiles = [statistics.quantiles(times, n=4)[0] for times in clock.found.values() if len(times) >= steps]
    return sum(quartiles) * 1e6 if quartiles else None


def fastest_us(functions: list[Callable[[], Any]], rounds: int, calls: int = 5) -> list[float]:
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            began = time.perf_counter()
            for _ in range(calls):
                function()
            best[i] = min(best[i], (time.perf_counter() - began) / calls * 1e6)
    return best


def main() -> None:
    options = measure.arguments("Callbacks against the same thing by hand.", rounds=4000).parse_args()
    torch.manual_seed(0)
    batch = (torch.rand(SIZE, 1, 8, 8), torch.randint(CLASSES, (SIZE,)))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    parameters, zero = list(net.parameters()), torch.zeros((), requires_grad=True) * 1.0

    def l1(batch: Any) -> Any:
        total = 1e-4 * sum(p.abs().sum() for p in parameters)
        return {"loss": zero + total, "penalty": total.detach(), "preds": None, "target": None}

    pairs: dict[str, tuple[lw.Callback, Callable[[Any], Any]]] = {
        "MixUp": (lw.MixUp(classes=CLASSES), mixup),
        "CutMix": (lw.CutMix(classes=CLASSES), cutmix),
        "RandomErasing": (lw.RandomErasing(), erased),
        "BatchTransform(fn(batch, rng))": (lw.BatchTransform(own_noise), noise),
        "Penalty": (lw.Penalty("l1", 1e-4), l1),
        "Throughput": (lw.Throughput(), Rate()),
        "Resources": (lw.Resources(), lambda batch: time.perf_counter()),
        "EarlyStopping, restoring": (lw.EarlyStopping(restore="best"), lambda batch: None),
        "nothing at all": (lw.Callback(), lambda batch: None),
    }
    goals = []
    for name, (callback, by_hand) in pairs.items():
        step = hooks_of(callback, net, batch)
        ours, hand = fastest_us([step, lambda by_hand=by_hand: by_hand(batch)], 500 if options.quick else 4000)
        note = f"by hand {hand:.1f} us"
        goals.append(Goal(f"{name}, its hooks in a step over the same by hand", ours - hand, "us", LIMIT_US, note))
    ce, margin = nn.CrossEntropyLoss(), nn.MultiMarginLoss()
    both = lw.losses.Weighted({"ce": ce, "margin": margin}, {"margin": 0.5})
    preds, target = net(batch[0]), batch[1]

    def summed() -> Any:
        terms = {"ce": ce(preds, target), "margin": margin(preds, target)}
        return {"loss": terms["ce"] + 0.5 * terms["margin"], **terms, "preds": preds, "target": target}

    weighted = [lambda: {**both(preds, target), "preds": preds, "target": target}, summed]
    ours, hand = fastest_us(weighted, 500 if options.quick else 4000)
    goals.append(Goal("losses.Weighted over the sum by hand", ours - hand, "us", LIMIT_US, f"by hand {hand:.1f} us"))
    whole: dict[str, tuple[lw.Callback, lw.Callback | None]] = {
        "Anneal": (lw.Anneal({"module.2.p": lw.schedules.linear(0.1, 0.5)}), DropoutSet()),
        "BatchTransform(fn(batch, rng)), fn that does nothing": (
            lw.BatchTransform(lambda batch, rng: batch),
            GeneratorSeeded(),
        ),
        "Capsule": (lw.Capsule(), StateKept()),
        "Changes": (lw.Changes(), None),
        "Doctor, between two looks": (lw.Doctor(show=False), None),
        "EarlyStopping": (lw.EarlyStopping("valid/loss", patience=100), None),
        "KeepBest": (lw.KeepBest("valid/loss"), None),
        "Predictions": (lw.Predictions(), None),
        "ProgressBar": (lw.ProgressBar(file=io.StringIO(), mode="lines"), None),
        "Report": (lw.Report(), None),
        "Requeue": (lw.Requeue(), None),
        "Resources": (lw.Resources(), None),
        "SWA, between two epochs": (lw.SWA("1 epoch"), None),
        "Throughput with tokens and FLOP/s": (lw.Throughput(tokens=lambda batch: 64, flops=True), None),
        "TorchProfiler, before it begins": (lw.TorchProfiler(wait=900), None),
        "Watch, between two looks": (lw.Watch("gradients", "activations"), None),
    }
    steps = 1000 if options.quick else 5000
    for name, (callback, by_hand) in whole.items():
        taken, hand = in_a_run(callback, batch, steps), 0.0
        if by_hand is not None:  # by turns, and the better of two runs: other work of the machine meets both
            hand = min(in_a_run(by_hand, batch, steps) or 0.0 for _ in range(2))
            taken = None if taken is None else min(taken, in_a_run(callback, batch, steps) or taken)
        note = "no tensor work" if by_hand is None else f"by hand {hand:.1f} us"
        what = "" if by_hand is None else " over the same by hand"
        over = None if taken is None else taken - hand
        goals.append(Goal(f"{name}, its hooks in a run{what}", over, "us", LIMIT_US, note))
    title = "## Callbacks, over the same thing by hand, where there is no tensor work of theirs"
    page = f"{title}\n\nMachine: {measure.machine()}.\n\n{measure.goal_table(goals)}"
    print(page)
    if options.write:
        measure.write_section(options.write, "callbacks", page)


if __name__ == "__main__":
    main()
