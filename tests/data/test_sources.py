from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from loopwright.data import DataModule, Gather, Iterated, Loader, TorchLoader, as_source, data_of, fingerprint, summary
from loopwright.errors import CheckpointError, DataError, SettingError


def source(data: Any, *, train: bool = True) -> Any:
    return as_source(data, train=train, key=3)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from range(100)


class Foreign:
    """A dataset of another library: no torch class."""

    def __len__(self) -> int:
        return 70

    def __getitem__(self, i: int) -> int:
        return i


def generated() -> Iterator[Any]:
    for i in torch.randperm(30)[:3]:
        yield torch.tensor([i, int(torch.randint(100, ()))])


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(70, 2),
        np.zeros((70, 2)),
        pd.DataFrame({"a": range(70)}),
        (np.zeros(70), torch.zeros(70)),
        {"x": np.zeros(70), "y": (torch.zeros(70),)},
        TensorDataset(torch.zeros(70)),
        Foreign(),
    ],
    ids=lambda data: type(data).__name__,
)
def test_arrays_and_datasets_are_read_64_at_a_time_and_shuffled_for_training_only(data: Any) -> None:
    for train in (True, False):
        made = source(data, train=train)
        assert type(made) is Loader
        assert (made.batch_size, made.shuffle, made.batches) == (64, train, 2)
        assert made.state_dict()["key"] == 3


def test_a_list_is_batches_and_a_tuple_is_columns() -> None:
    x, y = torch.zeros(4, 2), torch.zeros(4)
    assert [len(batch) for batch in source([(x, y), (x, y), (x, y)]).at(0, 0)] == [2, 2, 2]
    assert [len(batch[0]) for batch in source((x, y)).at(0, 0)] == [4]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (DataLoader(TensorDataset(torch.zeros(4))), Gather),
        (DataLoader(Foreign()), TorchLoader),  # type: ignore[arg-type]
        (DataLoader(Stream(), 8), Iterated),
        (Stream(), Iterated),
        (generated, Iterated),
        (iter([1]), Iterated),
    ],
)
def test_each_kind_of_data_has_its_adapter(data: Any, kind: type) -> None:
    made = source(data)
    assert type(made) is kind
    assert source(made) is made


def test_a_bare_stream_is_batched_too() -> None:
    assert [len(batch) for batch in source(Stream()).at(0, 0)] == [64, 36]


def test_a_subclass_that_iterates_in_its_own_way_is_left_to_it() -> None:
    class Doubling(DataLoader[Any]):
        def __iter__(self) -> Any:
            return (batch * 2 for batch in super().__iter__())

    made = source(Doubling(Foreign(), 35))  # type: ignore[arg-type]
    assert [int(batch[-1]) for batch in made.at(0, 0)] == [68, 138]
    assert made.exact == ["Doubling overrides how a DataLoader is iterated"]


def test_a_range_counts_batches_as_a_list_of_the_same_numbers_does() -> None:
    of_range, of_list = source(range(5)), source(list(range(5)))
    assert list(of_range.at(0, 3)) == list(of_list.at(0, 3)) == [3, 4]
    assert (of_range.batches, of_range.exact) == (of_list.batches, of_list.exact) == (5, [])
    assert fingerprint(range(5)) == fingerprint(list(range(5))) != fingerprint(range(6))
    assert "range gives ready batches; batch 0 is" in str(summary(range(5)))
    assert [len(batch) for batch in Loader(range(5), 2)] == [2, 2, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [None, "train.csv", Path("train.csv"), b"", 3, object()])
def test_what_is_no_data_is_refused_with_what_is(data: Any) -> None:
    with pytest.raises(DataError, match=r"cannot read batches from .*; expected a DataLoader, a dataset, arrays"):
        source(data)


def test_a_class_is_told_to_be_made() -> None:
    with pytest.raises(DataError) as caught:
        source(DataLoader)
    assert str(caught.value) == "DataLoader is a class; make an instance: DataLoader(...)"


def test_a_source_of_ones_own_is_told_what_it_lacks() -> None:
    class Short:
        batches = 2

        def at(self, epoch: int, batch: int) -> Iterator[Any]:
            yield from [torch.zeros(2)] * (2 - batch)

    with pytest.raises(DataError) as caught:
        source(Short())
    assert str(caught.value) == (
        "Short has at(epoch, batch), and lacks sizes, exact, state_dict, load_state_dict of a loopwright.state.Source; "
        "write them, or pass a generator function of batches, which needs none of them"
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], r"there is not one batch in the data (\[\]): it is empty. Check the path, the filter or the split that"),
        (torch.zeros(0, 3), "there is not one batch in the data (Tensor): it is empty."),
        ([(torch.zeros(0, 3), torch.zeros(0))] * 2, "there is not one sample in the 2 batches of the list: Check the"),
        (
            DataLoader(Foreign(), 80, drop_last=True),  # type: ignore[arg-type]
            "drop_last=True leaves nothing of 70 samples in batches of 80. Use drop_last=False or a batch_size of at "
            "most 70",
        ),
        (Loader(torch.zeros(5), 8, drop_last=True), "leaves nothing of 5 samples in batches of 8."),
        ((), "lw.Loader cannot read an empty tuple"),
        ({}, "lw.Loader cannot read an empty dict"),
        ((torch.zeros(3), [1, 2]), "lw.Loader cannot read a tuple of Tensor"),
        ((torch.zeros(3), torch.zeros(4)), "different lengths: len(data[0]) == 3, len(data[1]) == 4."),
    ],
)
def test_data_without_a_batch_is_refused_with_the_fix(data: Any, says: str) -> None:
    with pytest.raises(DataError) as error:
        source(data)
    assert says.replace("\\", "") in str(error.value)


@pytest.mark.parametrize("batched", [False, True])
def test_a_distributed_sampler_is_refused_with_the_fix(batched: bool) -> None:
    data = TensorDataset(torch.zeros(8))
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0)
    parts = {"batch_sampler": torch.utils.data.BatchSampler(sampler, 2, False)} if batched else {"sampler": sampler}
    with pytest.raises(DataError) as error:
        source(DataLoader(data, **parts))
    assert str(error.value) == (
        "this DataLoader has a DistributedSampler, but every batch is already shared out over the processes. Pass a "
        "loader without it, whose batch_size is that of all processes together: "
        "DataLoader(dataset, batch_size=..., shuffle=True)"
    )


# ------------------------------------------------------------------------------------------------------- iterated


def test_a_generator_function_starts_anew_each_epoch_and_resumes_by_reading_again() -> None:
    made = source(generated)
    assert (made.batches, made.sizes(0)) == (None, None)
    assert [len(list(made.at(epoch, 0))) for epoch in (0, 1)] == [3, 3]
    batches = made.at(2, 0)
    next(batches)
    state, generators = made.state_dict(), torch.get_rng_state()
    rest = list(batches)
    fresh = source(generated)
    fresh.load_state_dict(state)
    torch.set_rng_state(generators)
    resumed = fresh.at(2, 1)
    assert torch.equal(torch.get_rng_state(), generators)
    assert all(map(torch.equal, resumed, rest))
    assert made.exact == [
        "generated has no position to save, as an iterable with state_dict and load_state_dict has; a resume reads it "
        "again from the start of the epoch"
    ]


def test_an_iterator_is_good_for_one_epoch() -> None:
    made = source(iter([1, 2]))
    assert list(made.at(0, 0)) == [1, 2]
    with pytest.raises(DataError, match=r"list_iterator was used up in an earlier epoch\. Pass a list of"):
        list(made.at(1, 0))


def test_an_iterator_goes_on_where_it_was_left() -> None:
    made = source(iter([1, 2, 3]))
    batches = made.at(0, 0)
    assert next(batches) == 1
    batches.close()
    assert list(made.at(0, 1)) == [2, 3]


def test_a_generator_is_closed_with_its_epoch() -> None:
    closed = []

    def batches() -> Iterator[int]:
        try:
            yield from range(5)
        finally:
            closed.append(True)

    iterator = source(batches).at(0, 0)
    next(iterator)
    iterator.close()
    assert closed == [True]


def test_data_that_ends_before_the_saved_position_is_named() -> None:
    made = source(generated)
    with pytest.raises(DataError, match="cannot resume at batch 9: the data ended after 3 batches"):
        made.at(0, 9)


def test_a_list_of_another_length_is_refused_on_resume() -> None:
    with pytest.raises(CheckpointError, match="batches was 2 and is 3"):
        source([1, 2, 3]).load_state_dict(source([1, 2]).state_dict())


def test_a_function_that_gives_no_batches_is_named() -> None:
    with pytest.raises(DataError, match=r"returned float; expected batches to iterate\. Write it as a generator"):
        source(random.random).at(0, 0)


def test_an_error_in_a_stream_is_noted_with_its_batch() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk") as error:
        list(source(broken).at(0, 0))
    assert error.value.__notes__ == ["[loopwright] while fetching batch 2 of epoch 1"]


def test_a_stream_read_by_workers_says_why_it_is_not_exact_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataLoader, "check_worker_number_rationality", lambda self: None)
    made = source(DataLoader(Stream(), 8, num_workers=1))
    assert made.exact == ["the IterableDataset Stream has no state_dict and load_state_dict"]
    batches = made.at(0, 0)
    assert len(next(batches)) == 8
    batches.close()
    assert multiprocessing.active_children() == []


def test_a_loader_that_keeps_its_own_position_is_asked_for_it() -> None:
    class Stateful(DataLoader[Any]):
        seen = 0

        def __iter__(self) -> Any:
            for i in range(self.seen, 4):
                self.seen = i + 1
                yield i
            self.seen = 0

        def state_dict(self) -> dict[str, int]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    made = source(Stateful(Foreign()))  # type: ignore[arg-type]
    batches = made.at(0, 0)
    assert [next(batches), next(batches)] == [0, 1]
    fresh = source(Stateful(Foreign()))  # type: ignore[arg-type]
    fresh.load_state_dict(made.state_dict())
    assert list(fresh.at(0, 2)) == [2, 3]
    assert fresh.exact == []


# --------------------------------------------------------------------------------------------------------- module


class Digits(DataModule):
    def setup(self) -> None:
        self.x = torch.zeros(70, 2)

    def train_data(self) -> Any:
        return self.x, self.x

    def test_data(self) -> Any:
        return DataLoader(TensorDataset(self.x), 7)


def test_a_data_module_gives_what_a_source_can_read() -> None:
    module = Digits()
    module.prepare_data()
    module.setup()
    assert type(source(data_of(module, "train"))) is Loader
    assert type(source(data_of(module, "test"))) is Gather
    assert data_of(module, "valid") is None


def test_a_data_module_without_the_data_asked_for_says_what_to_write() -> None:
    with pytest.raises(DataError) as error:
        data_of(Digits(), "predict")
    assert str(error.value) == ("Digits.predict_data() gave None; define it: def predict_data(self): return loader")
    with pytest.raises(SettingError, match=r"unknown kind of data 'validate'.*Did you mean"):
        data_of(Digits(), "validate")


class OnlyDataset(Dataset[Any]):
    pass


def test_a_dataset_without_length_is_named() -> None:
    with pytest.raises(DataError, match="OnlyDataset has no __len__"):
        source(OnlyDataset())
