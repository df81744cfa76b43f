"""Batches that are copied one step ahead: on the CPU, with what copies telling in which order it is asked for what."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)

import loopwright as lw
from copies import Copies, use_copies
from loopwright import graphs, recordable
from loopwright.data import TorchLoader, ahead, as_source, move
from loopwright.data.ahead import Ahead, copy_ahead
from loopwright.data.batch import note_begun
from loopwright.data.share import Cut, shared
from resumed import Killed, resumes_exactly
from tape import Tapes
from tiny import acts, bits, classifier, line, loader, same, seed_all, trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataLoader, "check_worker_number_rationality", lambda self: None)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return use_copies(monkeypatch)


class Numbers(Dataset[Any]):
    """0, 1, 2, ... as columns; ``bad`` cannot be read, ``deadly``, an epoch and a number, ends the worker."""

    def __init__(self, n: int = 4, *, bad: int | None = None, deadly: tuple[int, int] | None = None) -> None:
        self.n, self.bad, self.deadly, self.epoch = n, bad, deadly, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Tensor:
        if i == self.bad:
            raise KeyError("no such file")
        if (self.epoch, i) == self.deadly:
            time.sleep(0.5)
            os._exit(3)
        return torch.tensor([float(i)])


def numbers(n: int = 4, batch_size: int = 1, *, bad: int | None = None, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(n, bad=bad), batch_size, num_workers=1, **settings)


class Mean(lw.Task):
    """Notes with which number the batch of a step begins."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self.net, self.log = line(), log

    def training_step(self, batch: Tensor) -> Tensor:
        self.log.append(("step", batch.flatten()[0].item()))
        loss: Tensor = self.net(batch).mean()
        return loss

    def validation_step(self, batch: Tensor) -> Tensor:
        return self.training_step(batch)

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.training_step(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def steps(log: list[Any]) -> list[float]:
    return [number for what, number in log if what == "step"]


def noisy(**settings: Any) -> DataLoader[Any]:
    return loader(noisy=True, batch_size=8, shuffle=True, num_workers=2, **settings)


# ------------------------------------------------------------------------------------------------- what is done when


def test_a_copy_begins_before_the_step_in_front_of_it_and_is_waited_for_before_its_own(log: list[Any]) -> None:
    trainer(epochs=2).fit(Mean(log), numbers(4))
    epoch = [
        *(("begin", 0), ("wait", 0), ("step", 0)),  # the first batch is what training waits for
        *(("begin", 1), ("wait", 1), ("begin", 2), ("step", 1)),
        *(("wait", 2), ("begin", 3), ("step", 2)),
        *(("wait", 3), ("step", 3)),
    ]
    assert log == 2 * epoch


def test_no_more_than_one_batch_is_fetched_ahead_where_a_run_stops_early(log: list[Any]) -> None:
    trainer(steps=3).fit(Mean(log), numbers(9))
    assert [number for what, number in log if what == "begin"] == [0, 1, 2, 3]
    assert log[-1] == ("wait", 3)  # before its memory is used for anything else
    assert multiprocessing.active_children() == []


def test_a_run_of_one_step_fetches_one_batch(log: list[Any]) -> None:
    trainer(steps=1).fit(Mean(log), numbers(9))
    assert log == [("begin", 0), ("wait", 0), ("step", 0)]


def test_windows_are_fetched_batch_by_batch(log: list[Any]) -> None:
    trainer(epochs=1, accumulate=2).fit(Mean(log), numbers(4))
    assert log[3:] == [
        *(("begin", 1), ("wait", 1), ("begin", 2), ("step", 1)),
        *(("wait", 2), ("begin", 3), ("step", 2), ("wait", 3), ("step", 3)),
    ]


def test_validation_prediction_and_replaced_data_are_copied_ahead_as_well(log: list[Any]) -> None:
    user = trainer(epochs=1)
    task = Mean(log)
    user.validate(task, numbers(3))
    assert log.count(("begin", 2)) == 1
    log.clear()
    user.predict(task, numbers(3))
    assert log.count(("begin", 2)) == 1
    log.clear()

    def replace(run: lw.Run) -> None:
        if run.progress.epoch == 1:
            run.replace("train", numbers(6))

    trainer(epochs=3, callbacks=[acts(on_epoch_end=replace)]).fit(task, numbers(3))
    assert log.count(("begin", 5)) == 2


# ------------------------------------------------------------------------------------------- nothing else is changed


def ends(log: list[Any], monkeypatch: pytest.MonkeyPatch, data: Callable[[], Any], **settings: Any) -> None:
    """A run that copies ahead leaves the bits of one that does not: weights, generators, records."""
    found = []
    for device in ("cpu", "cuda"):  # where it is done
        monkeypatch.setattr(ahead, "_DEVICE", device)
        seed_all(3)
        net = classifier(dropout=0.3, batch_norm=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        task = lw.Supervised(net, cross_entropy, optimizer)
        log.clear()
        run = trainer(**{"epochs": 2, "log_every": 2} | settings).fit(task, data(), noisy())
        assert bool(log) == (device == "cpu")
        told = {name: list(values) for name, values in run.history.losses.items()}
        found.append([*bits(net, optimizer), told, run.progress._replace(seconds=0), dict(run.metrics)])
    for one in found:
        one[-1] = {name: value for name, value in one[-1].items() if "valid" in name}
    assert same(*found)


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2}, {"validate_every": "2 steps"}, {"precision": "fp64"}],
    ids=str,
)
def test_the_bits_are_those_of_a_run_without(
    settings: dict[str, Any], log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(log, monkeypatch, noisy, **settings)


@pytest.mark.slow
def test_the_bits_are_those_of_a_run_without_for_workers_that_live_on_and_in_a_mix(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(log, monkeypatch, lambda: noisy(persistent_workers=True))
    ends(log, monkeypatch, lambda: lw.data.Mix({"a": noisy(), "b": noisy()}))


def test_the_bits_are_those_of_a_run_without_where_epochs_are_left_early(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(run: lw.Run, result: Any) -> None:
        if run.progress.step % 3 == 0:
            raise lw.StopEpoch

    ends(log, monkeypatch, noisy, callbacks=[acts(on_step_end=leave)], epochs=4)


@pytest.mark.slow
def test_the_bits_are_those_of_a_run_without_in_recorded_steps(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CudaRecorder", Tapes)
    monkeypatch.setattr(recordable, "_DEVICE", "cpu")
    ends(log, monkeypatch, noisy, cuda_graphs=True, epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_run_resumes_exactly_after_every_step(persistent: bool, log: list[Any]) -> None:
    def make() -> Any:
        net = classifier(dropout=0.2)
        task = lw.Supervised(net, cross_entropy, torch.optim.Adam(net.parameters(), lr=0.01))
        return task, []

    run = resumes_exactly(make, lambda: noisy(persistent_workers=persistent))
    assert run.exact is True
    assert log


def test_a_run_that_was_saved_while_copying_ahead_goes_on_without(
    folder: Any, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The position is that of the batch that was trained on."""

    def fit(stop: int | None = None, **settings: Any) -> Any:
        def kill(run: lw.Run, result: Any) -> None:
            if run.progress.step == stop:
                raise Killed

        seed_all(1)
        net = classifier(dropout=0.2)
        task = lw.Supervised(net, cross_entropy, torch.optim.Adam(net.parameters(), lr=0.01))
        user = lw.Trainer(
            epochs=2, progress=False, capsule=False, checkpoint=lw.Checkpoint("1 step"), folder=folder,
            callbacks=[acts(on_step_end=kill)], name="whole" if not settings and stop is None else "cut",
        )  # fmt: skip
        user.fit(task, noisy(), **settings)
        return bits(task)

    monkeypatch.setattr(ahead, "_DEVICE", "cuda")
    whole = fit()
    monkeypatch.setattr(ahead, "_DEVICE", "cpu")
    with suppress(Killed):
        fit(9)  # the last checkpoint is that of the step before
    assert log
    monkeypatch.setattr(ahead, "_DEVICE", "cuda")
    assert same(fit(resume="auto"), whole)


def test_what_hooks_and_weights_are_given_is_what_it_was(log: list[Any]) -> None:
    seen: list[Any] = []

    def weight(batch: Tensor) -> int:
        seen.append((batch.device.type, batch.flatten().tolist()))
        return len(batch)

    def begin(run: lw.Run, batch: Tensor) -> None:
        seen.append(batch.flatten().tolist())

    trainer(epochs=1, callbacks=[acts(on_batch_start=begin)]).fit(Mean(log), numbers(3), weight=weight)
    assert seen == [one for i in range(3) for one in ([float(i)], ("cpu", [float(i)]))]


# ------------------------------------------------------------------------------------------------------- its errors


def test_a_batch_that_cannot_be_read_is_an_error_after_the_step_before_it(log: list[Any]) -> None:
    with pytest.raises(KeyError, match="no such file") as error:
        trainer(epochs=1).fit(Mean(log), numbers(9, bad=4))
    assert steps(log) == [0, 1, 2, 3]
    notes = [note for note in error.value.__notes__ if "while fetching" in note]
    assert notes[0].startswith("[loopwright] while fetching batch 5 of epoch 1, dataset indices [4]")
    assert multiprocessing.active_children() == []


def test_an_error_in_a_step_ends_the_workers_and_waits_for_what_is_on_its_way(log: list[Any]) -> None:
    def fail(run: lw.Run, result: Any) -> None:
        if run.progress.step == 2:
            raise ValueError("in a hook")

    with pytest.raises(ValueError, match="in a hook"):
        trainer(epochs=1, callbacks=[acts(on_step_end=fail)]).fit(Mean(log), numbers(9))
    assert log[-1] == ("wait", 2)
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_is_told_with_the_batch_at_which_it_was(log: list[Any]) -> None:
    data = DataLoader(Numbers(9, deadly=(0, 4)), 1, num_workers=1, prefetch_factor=1)
    with pytest.raises(Exception, match="exit code 3") as error:
        trainer(epochs=1).fit(Mean(log), data)
    told = str(error.value) + str(getattr(error.value, "__notes__", ""))
    assert "while at batch 5 of epoch 1, dataset indices [4]" in told


def test_of_a_worker_that_dies_during_a_step_its_batch_is_told(log: list[Any]) -> None:
    def linger(run: lw.Run, result: Any) -> None:
        if run.progress.step == 9 + 3:  # the fourth batch is there, and the worker at the fifth
            time.sleep(20)  # which torch ends by an error

    data = DataLoader(Numbers(9, deadly=(1, 4)), 1, num_workers=1, prefetch_factor=1)
    with pytest.raises(RuntimeError, match="exited unexpectedly") as error:
        trainer(epochs=2, callbacks=[acts(on_step_end=linger)]).fit(Mean(log), data)
    assert steps(log)[9:] == [0, 1, 2]
    assert "while at batch 5 of epoch 2, dataset indices [4]" in str(error.value.__notes__)


def test_where_memory_is_short_batches_are_moved_as_ever_for_the_rest_of_the_epoch(log: list[Any]) -> None:
    Copies.full = True
    trainer(epochs=2).fit(Mean(log), numbers(4))
    epoch = [("begin", 0), ("wait", 0), ("step", 0), ("no room", 1), ("step", 1), ("step", 2), ("step", 3)]
    assert log == 2 * epoch


# -------------------------------------------------------------------------------------- what is copied, and what not


class OwnSampler(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))

    def __len__(self) -> int:
        return 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.tensor([float(i)]) for i in range(4)])


@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(Numbers(4), 1),
        lambda: DataLoader(TensorDataset(torch.arange(4.0).view(-1, 1)), 1, collate_fn=lambda rows: rows[0][0]),
        lambda: [torch.tensor([[float(i)]]) for i in range(4)],
        lambda: numbers(4, sampler=OwnSampler()),
        lambda: numbers(4, sampler=RandomSampler(Numbers(4), generator=torch.Generator())),
        lambda: numbers(4, in_order=False),
        lambda: DataLoader(Stream(), 1),
    ],
    ids=["no workers", "tensors", "list", "own sampler", "own generator", "in any order", "stream"],
)
def test_what_would_be_drawn_or_read_earlier_is_not_copied_ahead(data: Any, log: list[Any]) -> None:
    trainer(epochs=1).fit(Mean(log), data())
    assert len(steps(log)) == len(log) == 4


@pytest.mark.parametrize(
    "data",
    [
        lambda: numbers(4, shuffle=True),
        lambda: numbers(4, sampler=SubsetRandomSampler(range(4))),
        lambda: DataLoader(Numbers(4), batch_sampler=[[0], [1], [2], [3]], num_workers=1),
        lambda: DataLoader(Numbers(4), batch_sampler=BatchSampler(RandomSampler(Numbers(4)), 1, False), num_workers=1),
        lambda: lw.data.limit(numbers(9), batches=4),
    ],
    ids=["shuffled", "subset", "list of indices", "batch sampler", "limit"],
)
def test_known_orders_are_copied_ahead(data: Any, log: list[Any]) -> None:
    trainer(epochs=1).fit(Mean(log), data())
    assert len(steps(log)) == 4
    assert len([one for one in log if one[0] == "begin"]) in (4, 5)


def test_small_batches_are_not_worth_it(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LEAST", 9)  # bytes
    trainer(epochs=1).fit(Mean(log), numbers(4, batch_size=2))
    assert log == [("step", 0.0), ("step", 2.0)]
    log.clear()
    trainer(epochs=1).fit(Mean(log), numbers(6, batch_size=3))
    assert ("begin", 3.0) in log


def test_pieces_of_sequences_are_not_copied_ahead(log: list[Any]) -> None:
    class Pieces(Mean):
        truncate = 1

        def training_step(self, batch: Tensor, carry: Any = None) -> Any:
            return {"loss": super().training_step(batch), "carry": batch.mean()}

    trainer(epochs=1).fit(Pieces(log), numbers(3))
    assert log == [("step", 0.0), ("step", 1.0), ("step", 2.0)]


def test_each_of_several_ranks_copies_its_part(log: list[Any]) -> None:
    source = shared(as_source(numbers(8, batch_size=4), train=True, key=0), Cut(1, 2))
    copy_ahead(source, CPU, None)
    parts = [(part.batch.flatten().tolist(), part.size) for part in source.at(0, 0)]
    assert parts == [([2.0, 3.0], 4), ([6.0, 7.0], 4)]
    assert [number for what, number in log if what == "begin"] == [2.0, 6.0]


def test_a_source_that_was_used_on_a_gpu_copies_nothing_on_a_cpu(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TorchLoader(numbers())
    copy_ahead(source, CPU, None)
    first = source.ahead_copier
    copy_ahead(source, CPU, None)
    assert source.ahead_copier is first  # its stream is used again
    assert first is not None
    monkeypatch.setattr(ahead, "_DEVICE", "cuda")
    copy_ahead(source, CPU, None)
    assert source.ahead_copier is None


def test_a_pass_that_is_forgotten_waits_for_its_copy(log: list[Any]) -> None:
    passed = Ahead(iter([torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)]), Copies(CPU, None))
    next(passed), next(passed)
    del passed
    assert log[-1] == ("wait", 2.0)


def test_an_iterator_that_has_ended_is_not_held_by_its_own_end(log: list[Any]) -> None:
    def batches() -> Iterator[Tensor]:
        yield from torch.arange(3.0).split(1)

    inner = batches()
    gone = weakref.ref(inner)
    gc.disable()
    try:
        for _ in Ahead(inner, Copies(CPU, None)):
            pass
        del inner
        assert gone() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------ what takes the copy


def test_move_takes_the_copy_of_what_was_not_changed_since() -> None:
    batch = {"x": torch.zeros(2), "y": [torch.ones(1)], "z": torch.zeros(1, dtype=torch.float64), "name": "a"}
    copies = [torch.zeros(2, device="meta"), torch.ones(1, device="meta"), torch.zeros(1, device="meta")]
    for tensor, copy in zip((batch["x"], batch["y"][0], batch["z"]), copies, strict=True):
        note_begun(tensor, copy)
    batch["y"][0].add_(1)
    moved = move(batch, "meta", torch.float32)
    assert moved["x"] is copies[0]
    assert moved["y"][0] is not copies[1]
    assert moved["z"] is not copies[2]  # it is converted on its way
    assert move(batch, "cpu")["x"] is batch["x"]


def test_objects_with_a_to_of_their_own_and_other_than_plain_tensors_are_left_to_move(log: list[Any]) -> None:
    class Own(UserDict[str, Any]):
        def to(self, device: Any) -> Any:
            return SimpleNamespace(x=self["x"].to(device), moved=True)

    batch = [
        Own(x=torch.zeros(1)),
        torch.arange(4.0).view(2, 2)[:, :1],  # would get other strides
        nn.Parameter(torch.zeros(1)),
        torch.zeros(1, requires_grad=True),
        torch.eye(2).to_sparse(),
        torch.full((1, 2, 2, 2), 7.0).to(memory_format=torch.channels_last),
    ]
    (given,) = Ahead(iter([batch]), Copies(CPU, None))
    assert given is batch
    assert log == [("begin", 7.0), ("wait", 7.0)]
    assert move(batch, "meta")[0].moved
