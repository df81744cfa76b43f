"""The weights, optimizer state and random state after a fit are those of the loop that a person would write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from loopwright import rng
from tiny import bits, classifier, loader, pairs, same, samples, seed_all, sgd_task, trainer

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


@dataclass(frozen=True)
class Case:
    batch_size: int = 7
    drop_last: bool = False
    shuffle: bool = True
    epochs: int = 2
    optimizer: str = "sgd"
    dropout: float = 0.0
    batch_norm: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    validates: bool = False
    noisy: bool = False
    workers: int = 0
    generator: bool = False  # of the loader's own: its sampler draws once more when it is asked for more than there is

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any], DataLoader[Any]]:
        net = classifier(dropout=self.dropout, batch_norm=self.batch_norm)
        train = loader(
            noisy=self.noisy,
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            shuffle=self.shuffle,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(4) if self.generator else None,
        )
        valid = loader(11, noisy=self.noisy, batch_size=4)
        seed_all(3)
        return net, OPTIMIZERS[self.optimizer](net.parameters()), train, valid


def windows(case: Case, train: DataLoader[Any]) -> Iterator[tuple[Iterator[Any], float]]:
    """The batches of each optimizer step, fetched one at a time, and the number of their samples."""
    batches = iter(train)
    sizes = [min(case.batch_size, 37 - i) for i in range(0, 37, case.batch_size)][: len(train)]
    for i in range(0, len(sizes), case.accumulate):
        planned = sizes[i : i + case.accumulate]
        yield islice(batches, len(planned)), sum(planned)
    assert next(batches, None) is None


def by_hand(case: Case) -> list[Any]:
    net, optimizer, train, valid = case.parts()
    for _ in range(case.epochs):
        for window, total in windows(case, train):
            optimizer.zero_grad()
            for x, y in window:
                loss = cross_entropy(net(x), y)
                if case.accumulate > 1 and len(y) != total:
                    loss = loss * (len(y) / total)
                loss.backward()
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), case.clip_norm)
            optimizer.step()
        if case.validates:
            with evaluated(net):
                for x, y in valid:
                    cross_entropy(net(x), y)
    return bits(net, optimizer)


@contextmanager
def evaluated(net: nn.Module) -> Iterator[None]:
    net.eval()
    with rng.forked(), torch.no_grad():
        yield
    net.train()


def with_loopwright(case: Case) -> list[Any]:
    net, optimizer, train, valid = case.parts()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer)
    made = trainer(epochs=case.epochs, accumulate=case.accumulate, clip_norm=case.clip_norm)
    made.fit(task, train, valid if case.validates else None)
    return bits(net, optimizer)


@pytest.mark.filterwarnings("ignore:accumulate=")  # some epochs are shorter than a window
@pytest.mark.capability("PT-08")
@settings(max_examples=50)
@given(
    st.builds(
        Case,
        batch_size=st.sampled_from([5, 7, 13, 33, 37, 50]),
        drop_last=st.booleans(),
        shuffle=st.booleans(),
        epochs=st.integers(1, 3),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        dropout=st.sampled_from([0.0, 0.5]),
        batch_norm=st.booleans(),
        accumulate=st.sampled_from([1, 1, 2, 3]),
        clip_norm=st.sampled_from([None, 0.05, 1e6]),
        validates=st.booleans(),
        noisy=st.booleans(),
        generator=st.booleans(),
    )
)
@example(Case(generator=True, drop_last=True, accumulate=2))
@example(Case(generator=True, batch_size=37, accumulate=2))
def test_a_fit_has_the_bits_of_the_hand_written_loop(case: Case) -> None:
    """A fit gives the weights, optimizer state and random state of the plain loop over torch.optim, bit for bit."""
    if case.drop_last and case.batch_size > 37:
        return  # there would be no batch
    assert same(with_loopwright(case), by_hand(case))


@pytest.mark.parametrize(
    "case",
    [
        Case(workers=2, dropout=0.5),
        Case(workers=2, noisy=True, optimizer="adam", validates=True),
        Case(workers=2, noisy=True, accumulate=2, batch_size=13),
    ],
    ids=["tensors", "noisy", "accumulated"],
)
def test_a_fit_with_workers_has_the_bits_of_the_hand_written_loop(case: Case) -> None:
    assert same(with_loopwright(case), by_hand(case))


@pytest.mark.parametrize("n", [7, 13, 33])
def test_unaligned_batches_have_the_bits_of_the_hand_written_loop(n: int) -> None:
    """Views of a gathered chunk differ in the last bit where rows are not 64-byte aligned; batches here must not."""
    data = TensorDataset(torch.randn(5 * n, 43), torch.randn(5 * n, 1))
    nets = [nn.Linear(43, 1), nn.Linear(43, 1)]
    nets[1].load_state_dict(nets[0].state_dict())
    seed_all(1)
    optimizer = torch.optim.SGD(nets[0].parameters(), lr=0.1)
    for x, y in DataLoader(data, n, shuffle=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(nets[0](x), y).backward()
        optimizer.step()
    seed_all(1)
    trainer(epochs=1).fit(sgd_task(nets[1], lr=0.1, loss=nn.MSELoss()), DataLoader(data, n, shuffle=True))
    assert same(nets[0].state_dict(), nets[1].state_dict())


# ------------------------------------------------------------------------------------------------------- schedules


def scheduled(kind: str, optimizer: torch.optim.Optimizer) -> Any:
    if kind == "epoch":
        return CosineAnnealingLR(optimizer, T_max=4)
    if kind == "step":
        return ExponentialLR(optimizer, 0.9)
    if kind == "onecycle":
        return OneCycleLR(optimizer, max_lr=0.5, total_steps=24)
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)


@pytest.mark.parametrize("kind", ["epoch", "step", "onecycle", "plateau"])
@pytest.mark.parametrize("made", ["instance", "factory"])
def test_a_schedule_steps_when_a_hand_written_loop_steps_it(kind: str, made: str) -> None:
    case = Case(epochs=4, dropout=0.5)
    net, optimizer, train, valid = case.parts()
    scheduler, rates = scheduled(kind, optimizer), []
    for _ in range(case.epochs):
        for x, y in train:
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            if kind in ("step", "onecycle"):
                scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        with evaluated(net):
            measured = sum(float(cross_entropy(net(x), y)) * len(y) for x, y in valid) / 11
        if kind in ("epoch", "plateau"):
            scheduler.step(*[measured] * (kind == "plateau"))
    expected = bits(net, optimizer)

    net, optimizer, train, valid = case.parts()
    seen: list[float] = []
    wrap = lw.per_step if kind == "step" else lambda scheduler: scheduler
    schedule: Any = lambda o: wrap(scheduled(kind, o))  # noqa: E731
    task = lw.Supervised(
        net, nn.CrossEntropyLoss(), optimizer, schedule=schedule if made == "factory" else schedule(optimizer)
    )
    watcher = trainer(epochs=case.epochs)
    watcher.on(lw.Event.STEP_END)(lambda run: seen.append(run.lr))
    watcher.fit(task, train, valid)
    assert same(bits(net, optimizer), expected)
    assert seen == rates
    assert len(set(rates)) > 1


def test_a_schedule_counts_optimizer_steps_not_batches() -> None:
    net, optimizer, train, _ = Case(batch_size=5).parts()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, schedule=lw.per_step(ExponentialLR(optimizer, 0.5)))
    run = trainer(epochs=1, accumulate=3).fit(task, train)  # 8 batches: 3 steps
    assert run.progress.step == 3
    assert run.lr == pytest.approx(0.1 * 0.5**3, rel=1e-12)


# --------------------------------------------------------------------------------------------- nothing is wrapped


@pytest.mark.capability("CA-17", "PL-20")
def test_module_optimizer_and_loader_come_out_as_they_went_in() -> None:
    """Training wraps and patches nothing: the user's own objects are trained, and keep their classes and attributes."""
    net, optimizer, train, _ = Case(dropout=0.5).parts()
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    before = set(vars(optimizer)), set(vars(train)), vars(train).copy()
    classes = [type(m) for m in net.modules()]
    run = trainer(epochs=1).fit(lw.Supervised(net, nn.CrossEntropyLoss(), optimizer), train)
    assert run.models["model"] is net
    assert run.optimizers["main"] is optimizer
    assert [type(m) for m in net.modules()] == classes
    vars(net).pop("_trained_on")  # plain data, and the one thing that is added: what it was trained on
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert (set(vars(optimizer)), set(vars(train)), vars(train)) == before
    assert set(net.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert all(not m._forward_hooks and not m._backward_hooks for m in net.modules())


@pytest.mark.capability("IG-19")
def test_a_number_as_seed_gives_the_same_run_whatever_was_drawn_before() -> None:
    weights = []
    for warm_up in (0, 5):
        torch.rand(warm_up)
        net = classifier(dropout=0.5)
        trainer(epochs=1, seed=7).fit(sgd_task(net, loss=nn.CrossEntropyLoss()), loader(batch_size=7, shuffle=True))
        weights.append(bits(net))
    assert same(*weights)


def test_another_seed_gives_another_run() -> None:
    nets = [classifier(), classifier()]
    for seed, net in enumerate(nets):
        trainer(epochs=1, seed=seed).fit(sgd_task(net, loss=nn.CrossEntropyLoss()), loader(batch_size=7, shuffle=True))
    assert not same(nets[0].state_dict(), nets[1].state_dict())


def test_arrays_are_read_without_touching_the_global_generators() -> None:
    """Loopwright's own order for arrays never draws from the generators that belong to the user's model."""
    before = bits()
    trainer(epochs=2).fit(sgd_task(classifier(), loss=nn.CrossEntropyLoss()), samples())
    assert same(bits(), before)


def test_gradients_are_set_to_none_as_zero_grad_does() -> None:
    seen = []
    net = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])  # used in turns

    class Turns(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.turn = net, 0

        def training_step(self, batch: Any) -> Any:
            self.turn += 1
            return self.net[self.turn % 2](batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)

    watcher = trainer(epochs=1)
    watcher.on(lw.Event.STEP_END)(lambda run: seen.append([layer.weight.grad is None for layer in net]))
    watcher.fit(Turns(), pairs([1.0], [1.0]))
    assert seen == [[True, False], [False, True]]


def test_an_own_zero_grad_is_called() -> None:
    class Counting(torch.optim.SGD):
        calls = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.calls += 1
            super().zero_grad(set_to_none)

    net = nn.Linear(1, 1)
    optimizer = Counting(net.parameters(), lr=0.1)
    trainer(epochs=2).fit(lw.Supervised(net, nn.MSELoss(), optimizer), pairs([1.0], [2.0]))
    assert optimizer.calls == 4


def test_a_group_added_during_training_is_trained() -> None:
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    net = nn.Sequential(first, second)
    second.requires_grad_(False)
    before = second.weight.detach().clone()
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(first.parameters(), lr=0.1))
    watcher = trainer(epochs=2)

    @watcher.on(lw.Event.EPOCH_END(once=1))
    def thaw(run: lw.Run) -> None:
        assert torch.equal(second.weight, before)
        second.requires_grad_(True)
        run.optimizers["main"].add_param_group({"params": second.parameters()})

    watcher.fit(task, pairs([1.0], [2.0]))
    assert not torch.equal(second.weight, before)
