from __future__ import annotations

import types
import warnings
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import loopwright as lw
from loopwright.data import move, samples
from loopwright.errors import DataError

META = torch.device("meta")  # a device that every machine has


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    name: str
    x: Any


class Tagged(list[Any]):
    pass


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        [torch.zeros(3), torch.zeros(5)],
        (torch.zeros(3),),
        {"name": ["a", "b", "c"], "x": torch.zeros(3, 1)},
        [{"deep": (np.zeros((3, 2)), 1)}],
        Pair(torch.zeros(3), 0),
        Record("r", torch.zeros(3)),
        UserDict(x=torch.zeros(3)),
        [torch.tensor(1.0), torch.zeros(3)],  # a scalar has no first dimension
        np.zeros(3),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_samples_are_counted_on_the_first_array(batch: Any) -> None:
    assert samples(batch) == 3


@pytest.mark.parametrize("batch", [[], {}, "text", ["a", 1], None, torch.tensor(1.0)])
def test_a_batch_without_an_array_asks_for_weight(batch: Any) -> None:
    with pytest.raises(DataError, match=r"Pass weight=\.\.\., a function of the batch that returns the number"):
        samples(batch)


def test_the_message_describes_the_batch() -> None:
    with pytest.raises(DataError) as error:
        samples({"name": "a"})
    assert str(error.value) == (
        "cannot tell how many samples this batch holds: {'name': str} has no tensor with a first dimension. "
        "Pass weight=..., a function of the batch that returns the number"
    )


def test_moving_keeps_every_kind_of_container() -> None:
    t = torch.zeros(2)
    batch = {
        "list": [t, Tagged([t])],
        "pair": Pair(t, "text"),
        "record": Record("r", (t, 1.5)),
        "ordered": OrderedDict(a=t),
        "user": UserDict(a=t),
        "frozen": types.MappingProxyType({"a": t}),
        "array": np.zeros(2),
        "none": None,
    }
    moved = move(batch, META)
    assert list(moved) == list(batch)
    assert all(type(moved[k]) is type(batch[k]) for k in batch)
    assert type(moved["list"][1]) is Tagged
    for part in (
        moved["list"][0],
        moved["list"][1][0],
        moved["pair"].x,
        moved["record"].x[0],
        moved["ordered"]["a"],
        moved["user"]["a"],
        moved["frozen"]["a"],
    ):
        assert part.device == META
    assert moved["pair"].y == "text"
    assert moved["record"].name == "r"
    assert moved["array"] is batch["array"]
    assert t.device.type == "cpu"
    assert batch["user"]["a"] is t


def test_a_tensor_that_is_there_already_is_not_copied() -> None:
    t = torch.zeros(2)
    assert move([t], "cpu")[0] is t


def test_anything_with_to_is_moved_by_its_own_method() -> None:
    class Graph:
        def to(self, device: torch.device) -> str:
            return f"graph on {device}"

    assert move((Graph(), Graph), META) == ("graph on meta", Graph)


def test_a_leaf_that_cannot_be_moved_is_named_and_its_error_chained() -> None:
    class Stuck:
        def to(self, device: torch.device) -> None:
            raise RuntimeError("glued")

    with pytest.raises(DataError) as error:
        move({"x": [torch.zeros(1), Pair(Stuck(), 0)]}, "cpu")
    assert str(error.value) == (
        "batch['x'][1].x (Stuck) cannot be moved to cpu: glued. Return tensors, or objects whose .to(device) works, "
        "from the dataset or its collate_fn"
    )
    assert repr(error.value.__cause__) == "RuntimeError('glued')"


T = torch.zeros


@pytest.mark.parametrize(
    ("batch", "n"),
    [
        (([T(7, 2), T(5, 2), T(9, 2)], T(3)), 3),  # of several lengths, and a target for each
        ({"words": [T(7), T(5)], "y": T(2)}, 2),
        (([T(4), T(4), T(4)], T(3)), 3),  # of one length: the targets tell
        (([T(4), T(4)], [T(4)]), 4),  # columns of columns
        ([(T(1, 8, 8), 3), (T(1, 8, 8), 4), (T(1, 8, 8), 5)], 3),  # samples as they were read
        ([{"image": T(1, 8, 8), "name": "a"}, {"image": T(1, 8, 8), "name": "b"}], 2),
        ([(T(5, 2), torch.tensor(1.0)), (T(9, 2), torch.tensor(0.0))], 2),
        ([T(6, 2), {"extra": T(6)}, "names"], 6),
        ((T(9, 4), T(4)), 9),  # the first counts
    ],
)
def test_samples_of_lists_and_records(batch: Any, n: int) -> None:
    assert samples(batch) == n


class Texts(torch.utils.data.Dataset[Any]):
    """Ten ragged sequences, each with a number to predict."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.texts = [torch.randn(n, 4, generator=rng) for n in (2, 9, 3, 7, 5, 4, 6, 8, 30, 2)]
        self.target = torch.randn(10, generator=rng)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Any:
        return self.texts[i], self.target[i]


class Reads(lw.Task):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.line = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any) -> torch.Tensor:
        texts = batch[0] if isinstance(batch[0], list) else batch[0].unbind(1)
        preds = torch.stack([self.line(text).mean() for text in texts])
        return (preds - torch.as_tensor(batch[1])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def ragged(samples: Any) -> Any:
    texts, target = zip(*samples, strict=True)
    return list(texts), torch.stack(target)


def time_first(samples: Any) -> Any:
    texts, target = ragged(samples)
    return torch.nn.utils.rnn.pad_sequence(texts), target


def fit(task: lw.Task, data: Any, **more: Any) -> lw.Run:
    return lw.Trainer(epochs=1, folder=None, progress=False, **more).fit(task, data)


def test_ragged_batches_have_true_means_and_gradients() -> None:
    """Batches of 4, 4 and 2 sequences, one window of all: the step of ten samples, the mean and the validation."""
    data = torch.utils.data.DataLoader(Texts(), 4, collate_fn=ragged)
    ours, by_hand = Reads(), Reads()
    run = fit(ours, data, accumulate=3)
    total = torch.stack([by_hand.training_step(batch) * len(batch[1]) for batch in data]).sum() / 10
    total.backward()
    by_hand.configure_optimizers().step()
    assert run.progress.samples == 10
    torch.testing.assert_close(ours.line.weight, by_hand.line.weight)
    assert run.history[-1]["train/loss"] == pytest.approx(total.item())
    assert lw.Trainer(progress=False).validate(Reads(), data)["valid/loss"] == pytest.approx(total.item())


def test_a_batch_that_is_counted_otherwise_than_its_loader_made_it_is_refused() -> None:
    """Time first, and pairs of images as they were read: before the first step, and in a validation."""
    data = torch.utils.data.DataLoader(Texts(), 4, collate_fn=time_first)
    told = r"\(float32\[9, 4, 4\], float32\[4\]\) is counted as 9 samples.*its loader has put 4 into it.*pass weight="
    task = Reads()
    with pytest.raises(lw.DataError, match=f"the training batch {told}"):
        fit(task, data)
    assert task._run.progress.step == 0
    for method in (lw.Trainer(progress=False).validate, lw.Trainer(progress=False).test):
        with pytest.raises(lw.DataError, match=told):
            method(Reads(), data)
        method(Reads(), data, weight=lambda batch: len(batch[1]))
    pairs = torch.utils.data.DataLoader([(T(1, 8), T(1, 8))] * 6, 3, collate_fn=lambda samples: samples)
    with pytest.raises(lw.DataError, match=r"is counted as 1 sample,.*its loader has put 3 into it"):
        lw.Trainer(progress=False).validate(Reads(), pairs)


def test_where_no_plan_tells_parts_that_do_not_agree_are_warned_of() -> None:
    data = [time_first([Texts()[i] for i in range(4)])]
    with pytest.warns(lw.LoopwrightWarning, match=r"is counted as 9 samples, while the first.* are 9 and 4"):
        fit(Reads(), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lw.LoopwrightWarning)
        lw.Trainer(epochs=1, folder=None, progress=False).fit(Reads(), data, weight=lambda batch: 4)
        views = torch.utils.data.DataLoader(Texts(), 5, collate_fn=lambda some: ragged(some + some))  # twice as many
        assert fit(Reads(), views).progress.samples == 20
