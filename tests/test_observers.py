"""Watching changes nothing: whatever looks on, the weights, optimizer state and random state are the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import loopwright as lw
from tiny import bits, classifier, loader, recorder, same, samples, seed_all


class Look(lw.Callback):
    """Reads all that it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_backward_end(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: lw.Phase) -> None:
        self.seen.append((loss.item(), output["preds"].argmax(1).tolist(), batch[0].sum().item()))

    def on_grads_ready(self, run: lw.Run, phase: lw.Phase, grad_norm: Any) -> None:
        self.seen.append([p.grad.norm().item() for p in phase.parameters() if p.grad is not None])

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        self.seen.append((run.lr, repr(run), dict(run.metrics), run.progress))
        run.log({"first": result.values["loss"]})


class LogMore(lw.Callback):
    def on_epoch_end(self, run: lw.Run) -> None:
        assert run.history[-1]["epoch"] == run.progress.epoch
        run.history["train/loss"]
        [p.detach().norm().item() for model in run.models.values() for p in model.parameters()]


def draw(run: lw.Run) -> None:
    torch.rand(3), random.random(), np.random.rand()


def observed(watchers: set[str], folder: Path | None = None, plan: bool = False) -> list[Any]:
    """A fit with dropout and augmentation, watched by ``watchers``; its bits and the batches it saw."""
    net, batches = classifier(dropout=0.5, batch_norm=True), []
    net[0].register_forward_hook(lambda module, args, out: batches.append(args[0]) if module.training else None)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    train = loader(23, batch_size=7, shuffle=True, noisy=True)
    valid = loader(9, batch_size=4, shuffle=True, noisy=True)
    seed_all(5)
    has = watchers.__contains__
    task = lw.Supervised(
        net,
        nn.CrossEntropyLoss(),
        optimizer,
        metrics={"accuracy": lw.metrics.Accuracy()} if has("metrics") else None,
        schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3),
    )
    callbacks: list[lw.Callback] = []
    callbacks += [Look()] if has("look") else []
    callbacks += [LogMore()] if has("log more") else []
    callbacks += [recorder([])] if has("every hook") else []
    callbacks += [lw.Profiler(show=False)] if has("profiler") else []
    callbacks += [lw.TorchProfiler(wait=1, active=2, folder=folder)] if has("torch profiler") else []
    callbacks += [lw.Doctor(2, show=False)] if has("doctor") else []
    callbacks += [lw.Audit()] if has("audit") else []
    callbacks += [lw.EMA(0.9)] if has("averages") else []
    callbacks += [lw.Throughput(3), lw.Resources()] if has("throughput") else []
    callbacks += [lw.Predictions(folder, kinds="valid")] if has("predictions") else []
    at = lw.Event.STEP_END(every=2) | lw.Event.VALIDATION_END
    callbacks += [lw.Watch("parameters", "gradients", "activations", "optimizer", at=at)] if has("watch") else []
    user = lw.Trainer(
        epochs=2,
        callbacks=callbacks,
        progress=has("bar"),
        folder=folder if has("folder") or has("checkpoint") else None,
        checkpoint=lw.Checkpoint("2 steps") if has("checkpoint") else False,
        log_every=1 if has("often") else "50 steps",
        validate_every="3 steps" if has("validate within") and has("validation") else "1 epoch",
    )
    if has("draws"):
        user.on(lw.Event.VALIDATION_START | lw.Event.EVAL_BATCH_END | lw.Event.VALIDATION_END)(draw)
    if has("handlers"):
        user.on(lw.Event.STEP_END(every="2 steps"))(lambda run, result: result.values["loss"].item())
    if has("summary"):
        lw.summary(net, torch.zeros(2, 5))
    if has("plan"):
        user.plan(task, train, valid)
        user.explain(task, train, valid)
    if has("rehearsal"):
        rehearsed = lw.Trainer(epochs=2, debug=lw.Debug(dev_run=2), callbacks=callbacks, folder=None, progress=False)
        rehearsed.fit(task, train, valid)
    if has("rate finder"):
        assert len(lw.lr_find(user, task, train, steps=4).lrs) == 4
    batches.clear()
    run = user.fit(task, train, valid if has("validation") else None)
    assert run.progress.step == 8
    return [*bits(net, optimizer), [b.clone() for b in batches]]


WATCHERS = [
    "bar", "folder", "metrics", "validation", "validate within", "often", "checkpoint", "look", "log more",
    "every hook", "draws", "handlers", "plan", "profiler", "torch profiler", "doctor", "audit", "summary",
    "watch", "averages", "throughput", "predictions", "rehearsal", "rate finder",
]  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return observed(set())


@pytest.mark.capability("B-02")
@pytest.mark.parametrize("watcher", WATCHERS)
def test_no_watcher_changes_a_bit(watcher: str, expected: list[Any], folder: Path) -> None:
    """Validation, rehearsal, logs, rate finder, callbacks, each on or off: the same batches, weights and draws."""
    assert same(observed({watcher}, folder), expected)
    assert same(observed({watcher, "validation"}, folder), expected)


@pytest.mark.capability("B-02")
def test_any_set_of_watchers_changes_no_bit(expected: list[Any], tmp_path_factory: Any) -> None:
    """Any set of them, all at once included."""
    assert same(observed(set(WATCHERS), tmp_path_factory.mktemp("all")), expected)

    @settings(max_examples=12)
    @given(st.sets(st.sampled_from(WATCHERS), min_size=2))
    def check(watchers: set[str]) -> None:
        assert same(observed(watchers, tmp_path_factory.mktemp("some")), expected)

    check()


def test_planning_leaves_the_optimizer_as_it_was() -> None:
    """Also where a schedule is made to be looked at, and when the plan finds a problem."""
    net = classifier()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    before = bits(optimizer)
    factories: list[Callable[[Any], Any]] = [
        lambda o: torch.optim.lr_scheduler.LinearLR(o),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=1),
    ]
    for schedule in factories:
        task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, schedule=schedule)
        user = lw.Trainer(epochs=2, folder=None, progress=False)
        user.plan(task, loader(batch_size=7))
        user.explain(task, loader(batch_size=7))
        assert same(bits(optimizer), before)
    with pytest.raises(lw.PlanError, match="OneCycleLR was made for 1 steps, but phase 'main' takes 12"):
        user.fit(task, loader(batch_size=7))
    assert same(bits(optimizer), before)


def test_an_observer_that_does_change_something_changes_the_bits(expected: list[Any]) -> None:
    """The tests above would notice: one draw outside of the validation is enough."""

    class Careless(lw.Callback):
        def on_epoch_start(self, run: lw.Run) -> None:
            draw(run)

    net = classifier(dropout=0.5, batch_norm=True)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    train = loader(23, batch_size=7, shuffle=True, noisy=True)
    seed_all(5)
    schedule = lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3)  # noqa: E731
    task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, schedule=schedule)
    lw.Trainer(epochs=2, folder=None, progress=False, callbacks=[Careless()]).fit(task, train)
    assert not same(bits(net), expected[:1])


class Shared(Dataset[Any]):
    """Augments by a generator of its own and by the epoch that it was told."""

    def __init__(self) -> None:
        self.x, self.y = samples(12)
        self.rng, self.epoch, self.told = np.random.default_rng(3), 0, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + self.rng.random() + self.epoch, self.y[i]


class Jitter(nn.Module):
    """Noise from a generator of its own, in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=self.generator)


class JitteredTask(lw.Task):
    """Holds the generator on the task itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.rng = classifier(), random.Random(6)

    def training_step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0] + self.rng.random()), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), 0.1)


def with_one_generator() -> tuple[Any, Any, Any]:
    g = torch.Generator().manual_seed(7)
    return supervised(), loader(12, batch_size=4, shuffle=True, generator=g), loader(8, shuffle=True, generator=g)


def with_one_dataset() -> tuple[Any, Any, Any]:
    dataset = Shared()
    return supervised(), DataLoader(dataset, 4, shuffle=True), DataLoader(dataset, 5)


def with_one_loader() -> tuple[Any, Any, Any]:
    shared = lw.Loader(Shared(), 4, shuffle=True, seed=1)
    return supervised(), shared, shared


def with_one_stream() -> tuple[Any, Any, Any]:
    class Stream(IterableDataset[Any]):
        def __init__(self) -> None:
            self.map = Shared()

        def set_epoch(self, epoch: int) -> None:
            self.map.set_epoch(epoch)

        def __iter__(self) -> Any:
            return (self.map[i] for i in range(len(self.map)))

    stream = Stream()
    return supervised(), DataLoader(stream, 4), DataLoader(stream, 5)


def with_noise_in_the_net() -> tuple[Any, Any, Any]:
    return supervised(Jitter()), loader(12, batch_size=4), loader(8)


def with_noise_in_the_task() -> tuple[Any, Any, Any]:
    task = JitteredTask()
    return task, loader(12, batch_size=4), loader(8)


def supervised(*layers: nn.Module) -> lw.Supervised:
    net = nn.Sequential(*layers, classifier())
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))


@pytest.mark.filterwarnings("ignore:.*the IterableDataset Stream has no state_dict")
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        with_one_generator, with_one_dataset, with_one_loader, with_one_stream, with_noise_in_the_net,
        with_noise_in_the_task,
    ],
)  # fmt: skip
def test_validation_changes_nothing_that_training_shares_with_it(make: Any, within: bool) -> None:
    """A generator, a dataset or a loader used by both; generators that hang on modules and tasks."""

    def fitted(validates: bool) -> list[Any]:
        task, train, valid = make()
        seed_all(5)
        user = lw.Trainer(
            epochs=3, folder=None, progress=False,
            validate_every="2 steps" if within and validates else "1 epoch",
        )  # fmt: skip
        run = user.fit(task, train, valid if validates else None)
        assert run.progress.step == 9
        return bits(task)

    assert same(fitted(True), fitted(False))


def test_prediction_and_validation_outside_of_a_fit_put_generators_back_and_tell_no_epoch() -> None:
    dataset, user = Shared(), lw.Trainer(epochs=1, folder=None, progress=False)
    task = supervised(Jitter())
    user.validate(task, DataLoader(dataset, 5))
    generator = task.module[0].generator  # type: ignore[index]
    states = generator.get_state(), dataset.rng.bit_generator.state
    user.predict(task, lw.Loader(dataset, 4))
    user.test(task, DataLoader(dataset, 5))
    assert torch.equal(generator.get_state(), states[0])
    assert dataset.rng.bit_generator.state == states[1]
    assert not dataset.told
