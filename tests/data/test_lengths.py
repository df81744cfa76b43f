from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

import loopwright as lw
from loopwright.data import Loader, as_source
from loopwright.data.lengths import epoch_length, limit
from loopwright.errors import CheckpointError, DataError, SettingError
from splits import check_every_split
from tiny import trainer


class Noisy(Dataset[Any]):
    def __init__(self) -> None:
        self.rng = np.random.default_rng(2)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2) + i, self.rng.random()


KINDS: dict[str, Callable[[], Any]] = {
    "list": lambda: [torch.tensor(i) for i in range(4)],
    "arrays": lambda: Loader(torch.arange(10), 3, shuffle=True),
    "plain": lambda: DataLoader(TensorDataset(torch.arange(10)), 3, shuffle=True),
    "noisy": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "own generator": lambda: DataLoader(Noisy(), 3, shuffle=True, generator=torch.Generator().manual_seed(3)),
}


def read(data: Any, epochs: int = 3) -> list[list[Any]]:
    source = as_source(data, train=True, key=0)
    return [list(source.at(epoch, 0)) for epoch in range(epochs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batches", [1, 3, 4, 9])
def test_limited_data_resumes_at_every_batch_in_bits(kind: str, batches: int) -> None:
    check_every_split(lambda: limit(KINDS[kind](), batches=batches))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batches", [1, 3, 4, 9])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_epochs_of_any_length_resume_at_every_batch_in_bits(kind: str, batches: int, twice: bool) -> None:
    check_every_split(lambda: epoch_length(KINDS[kind](), batches), twice=twice)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_of_the_datas_own_length_change_nothing(kind: str) -> None:
    for ours, theirs in zip(
        check_every_split(lambda: epoch_length(KINDS[kind](), 4)), check_every_split(KINDS[kind]), strict=True
    ):
        assert str(ours) == str(theirs)


def test_a_limit_counts_batches_samples_or_a_fraction() -> None:
    data = Loader(torch.arange(10), 3)
    lengths = {
        (name, value): [len(batch) for batch in read(limit(data, **{name: value}), 1)[0]]
        for name, value in [("batches", 2), ("batches", 9), ("samples", 6), ("samples", 7), ("fraction", 0.3)]
    }
    assert lengths == {
        ("batches", 2): [3, 3],
        ("batches", 9): [3, 3, 3, 1],
        ("samples", 6): [3, 3],
        ("samples", 7): [3, 3, 3],
        ("fraction", 0.3): [3, 3],
    }


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 40), st.integers(0, 9))
def test_a_limited_plan_is_the_truth(length: int, size: int, samples: int, start: int) -> None:
    source = as_source(limit(Loader(torch.arange(length), size), samples=samples), train=True, key=0)
    true = [len(batch) for batch in source.at(0, 0)]
    assert source.batches == len(true)
    assert list(source.sizes(start) or ()) == true[start:]
    assert sum(true) >= min(samples, length) > sum(true[:-1])


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 4), st.data())
def test_epochs_go_on_where_the_last_ended_and_any_batch_can_be_reached(
    n: int, batches: int, epoch: int, data: Any
) -> None:
    start = data.draw(st.integers(0, batches))
    source = as_source(epoch_length(list(range(n)), batches), train=True, key=0)
    assert list(source.at(epoch, start)) == [i % n for i in range(epoch * batches + start, (epoch + 1) * batches)]
    assert source.batches == batches


def test_data_without_an_end_is_not_begun_again() -> None:
    begun = []

    def forever() -> Iterator[int]:
        begun.append(True)
        yield from count()

    assert read(epoch_length(forever, 3)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert begun == [True]


def test_an_endless_stream_is_closed_with_the_run_or_when_it_is_left() -> None:
    closed = []

    def forever() -> Iterator[int]:
        try:
            yield from count()
        finally:
            closed.append(True)

    source: Any = as_source(epoch_length(forever, 2), train=True, key=0)
    list(source.at(0, 0))
    assert closed == []
    source.close()
    assert closed == [True]
    batches = source.at(0, 0)
    next(batches)
    batches.close()
    assert closed == [True, True]


def test_what_is_left_in_the_middle_goes_on_there() -> None:
    for kind in KINDS.values():
        source = as_source(epoch_length(kind(), 3), train=True, key=0)
        batches: Any = source.at(0, 0)
        first = next(batches)
        batches.close()
        assert len([first, *source.at(0, 1)]) == 3


def test_each_pass_over_the_data_has_an_order_of_its_own() -> None:
    (one, two) = read(epoch_length(Loader(torch.arange(50), 50, shuffle=True), 1), 2)
    assert not torch.equal(one[0], two[0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: limit([1]), "limit takes one of batches=, samples= and fraction=; got none"),
        (
            lambda: limit([1], batches=1, samples=2),
            "limit takes one of batches=, samples= and fraction=; got {'batches'",
        ),
        (lambda: limit([1], batches=0), "batches=0; expected a whole number from 1"),
        (lambda: limit([1], fraction=1.5), "fraction=1.5; expected a number above 0, at most 1"),
        (lambda: epoch_length([1], 2.5), "batches=2.5; expected a whole number from 1"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(SettingError) as error:
        make()
    assert says in str(error.value)


def test_what_cannot_be_counted_says_what_to_write() -> None:
    for given_ in ({"samples": 5}, {"fraction": 0.5}):
        with pytest.raises(
            DataError, match=r"needs data whose batches can be counted before.*limit\(data, batches=\.\.\.\)"
        ):
            as_source(limit(lambda: iter([1]), **given_), train=True, key=0)


def test_data_that_is_used_up_is_named_and_not_asked_for_ever() -> None:
    with pytest.raises(DataError, match="used up in an earlier epoch"):
        read(epoch_length(iter([1, 2, 3]), 2))
    with pytest.raises(DataError, match="gave no batch in its epoch 1"):
        read(epoch_length(lambda: iter(()), 2))


def test_another_length_than_the_saved_one_is_refused() -> None:
    state = as_source(epoch_length([1, 2], 3), train=True, key=0).state_dict()
    with pytest.raises(CheckpointError, match="epoch_length was 3 and is 4"):
        as_source(epoch_length([1, 2], 4), train=True, key=0).load_state_dict(state)
    state = as_source(limit([1, 2], batches=1), train=True, key=0).state_dict()
    with pytest.raises(CheckpointError, match="limit was 1 and is 2"):
        as_source(limit([1, 2], batches=2), train=True, key=0).load_state_dict(state)


def test_validation_of_lengthened_data_reads_the_same_each_time() -> None:
    source = as_source(epoch_length([1, 2, 3], 2), train=False, key=0)
    assert [list(source.at(0, 0)) for _ in range(3)] == [[1, 2]] * 3


def test_fit_trains_on_limited_and_lengthened_data() -> None:
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    for data, seen in ((limit(Loader((x, x), 6), fraction=0.5), 12), (epoch_length(Loader((x, x), 6), 5), None)):
        net = torch.nn.Linear(1, 1)
        task = lw.Supervised(net, torch.nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1))
        run = trainer(epochs=2, accumulate=2).fit(task, data, limit((x, x), batches=1))
        assert run.progress.samples == (52 if seen is None else 2 * seen)
        assert run.exact is True
