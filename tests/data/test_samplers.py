"""Weighted, balanced and length-bucketed batches; and a sampler of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwright.data import BatchSampler, Blocks, BucketSampler, Loader, WeightedSampler
from loopwright.errors import CheckpointError, DataError, SettingError


def rows(sampler: BatchSampler, epoch: int = 0, key: int = 0) -> list[list[int]]:
    return [torch.as_tensor(batch).tolist() for batch in sampler.batches(epoch, key)]


class EveryOther:
    """The even samples in even epochs, the odd ones in the others; as many batches as it takes."""

    def batches(self, epoch: int, key: int) -> list[list[int]]:
        return [[0, 2], [4]] if epoch % 2 == 0 else [[1, 3]]


# ------------------------------------------------------------------------------------------------------- weighted


def test_samples_come_as_often_as_their_weights_say() -> None:
    weights = np.array([0.0, 1.0, 2.0, 5.0, 0.0])
    drawn = np.concatenate(rows(WeightedSampler(weights, 1000, samples=200_000)))
    share = np.bincount(drawn, minlength=5) / len(drawn)
    deviation = np.sqrt(weights / 8 * (1 - weights / 8) / len(drawn))
    assert (np.abs(share - weights / 8) <= 4 * deviation).all(), share


@settings(max_examples=60)
@given(
    weights=st.lists(st.sampled_from([0.0, 5e-324, 1e-300, 0.1, 1e308]), min_size=1, max_size=8).filter(any),
    size=st.integers(1, 9),
    samples=st.integers(1, 20) | st.none(),
    epoch=st.integers(0, 9),
)
def test_only_samples_with_a_weight_come_in_batches_as_planned(
    weights: list[float], size: int, samples: int | None, epoch: int
) -> None:
    sampler = WeightedSampler(weights, size, samples=samples)
    found = rows(sampler, epoch)
    total = samples or len(weights)
    assert [len(batch) for batch in found] == [min(size, total - i) for i in range(0, total, size)]
    assert all(weights[i] > 0 for batch in found for i in batch)
    assert found == rows(sampler, epoch)


@pytest.mark.parametrize(
    "labels", [[0] * 90 + [1] * 9 + [2], ["a"] * 90 + ["b"] * 9 + ["c"], torch.tensor([0] * 90 + [1] * 9 + [2])]
)
def test_balanced_classes_come_equally_often(labels: Any) -> None:
    for column in (labels, pd.Series(labels)):
        drawn = np.concatenate(rows(WeightedSampler.balanced(column, 500, samples=30_000)))
        share = np.bincount(np.repeat([0, 1, 2], [90, 9, 1])[drawn]) / len(drawn)
        assert np.abs(share - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 30_000)


@pytest.mark.parametrize("labels", [[0.5, 1.0], torch.tensor([0.5, 1.0]), pd.Series([0.5, 1.0])])
def test_measured_values_are_no_classes(labels: Any) -> None:
    with pytest.raises(DataError) as error:
        WeightedSampler.balanced(labels)
    assert str(error.value) == (
        "labels[0] is 0.5; expected a class for each sample, a name or a whole number. Of measured values make classes "
        "first: numpy.digitize(values, edges)"
    )
    assert WeightedSampler.balanced([0.0, 1.0, 1.0]).weights.tolist() == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_that_are_none_are_refused(weights: Any) -> None:
    with pytest.raises(DataError, match="weights must be finite numbers >= 0, one of them at least above 0"):
        WeightedSampler(weights)


@pytest.mark.parametrize("weights", [[], [[1, 2]]])
def test_weights_of_another_shape_are_refused(weights: Any) -> None:
    with pytest.raises(DataError, match=r"weights has shape .*; expected one number for each sample"):
        WeightedSampler(weights)


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="weights is a NumPy array of dtype <U1; expected numbers or booleans"):
        WeightedSampler(["a", "b"])


# -------------------------------------------------------------------------------------------------------- buckets


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=80),
    size=st.integers(1, 9) | st.none(),
    room=st.integers(0, 200) | st.none(),
    buckets=st.integers(1, 20),
    epoch=st.integers(0, 5),
)
def test_every_sample_comes_once_in_batches_within_the_limits(
    lengths: list[int], size: int | None, room: int | None, buckets: int, epoch: int
) -> None:
    tokens = None if room is None and size else max(lengths) + (room or 1)
    sampler = BucketSampler(lengths, size, tokens=tokens, buckets=buckets)
    found = rows(sampler, epoch)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= (size or len(lengths)) for batch in found)
    assert all(len(batch) * max(lengths[i] for i in batch) <= (tokens or 10**9) for batch in found)
    assert len(found) == len(rows(sampler, epoch + 1))
    assert found == rows(sampler, epoch)


def test_buckets_pad_little_and_shuffle_each_epoch() -> None:
    lengths = np.random.RandomState(0).randint(1, 500, 2000)
    sampler = BucketSampler(lengths, 20)
    first, second = rows(sampler, 0), rows(sampler, 1)

    def padded(batches: list[list[int]]) -> float:
        return sum(len(b) * max(lengths[b]) for b in batches) / lengths.sum()

    plain = [list(range(i, i + 20)) for i in range(0, 2000, 20)]
    assert padded(first) < 1.15 < 1.8 < padded(plain)
    assert {frozenset(batch) for batch in first}.isdisjoint(frozenset(batch) for batch in second)
    means = [lengths[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4, "short batches do not come first"


def test_a_sample_above_the_limit_is_named() -> None:
    with pytest.raises(DataError, match=r"sample 1 has length 9, more than tokens=8\. Cut the sample"):
        BucketSampler([3, 9, 2], tokens=8)
    with pytest.raises(SettingError, match=r"BucketSampler needs a limit: batch_size=\.\.\. samples, or tokens="):
        BucketSampler([3, 9, 2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedSampler([1], 0),
        lambda: WeightedSampler([1], samples=0),
        lambda: BucketSampler([1], True),
        lambda: BucketSampler([1], tokens=0),
        lambda: BucketSampler([1], 1, buckets=0),
    ],
)
def test_numbers_below_one_are_refused(make: Any) -> None:
    with pytest.raises(SettingError, match="expected a whole number of at least 1"):
        make()


# ------------------------------------------------------------------------------------------------------ in a loader


@pytest.mark.parametrize(
    "sampler",
    [WeightedSampler(range(10), 3), BucketSampler(range(10), tokens=20), EveryOther()],
    ids=lambda s: type(s).__name__,
)
def test_a_loader_gives_the_sampler_s_batches_from_anywhere_and_knows_their_sizes(sampler: BatchSampler) -> None:
    loader = Loader(torch.arange(10), sampler=sampler, seed=4)
    for epoch in range(3):
        planned = rows(sampler, epoch, 4)
        for batch in range(len(planned) + 1):
            assert [b.tolist() for b in loader.at(epoch, batch)] == planned[batch:]
            assert list(loader.sizes(batch)) == [len(b) for b in planned[batch:]]
            assert len(loader) == loader.batches == len(planned)


def test_keys_and_epochs_have_batches_of_their_own() -> None:
    for sampler in (WeightedSampler([1] * 30), BucketSampler([1] * 30, 30)):
        orders = {tuple(map(tuple, rows(sampler, epoch, key))) for epoch in range(10) for key in range(10)}
        assert len(orders) == 100


def test_a_resumed_run_refuses_other_weights_and_another_sampler() -> None:
    x = torch.arange(4)
    state = Loader(x, sampler=WeightedSampler([1, 1, 1, 5], 2)).keyed(3).state_dict()
    fresh = Loader(x, sampler=WeightedSampler([1, 1, 1, 5], 2)).keyed(8)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    for other in (WeightedSampler([5, 1, 1, 1], 2), WeightedSampler([1, 1, 1, 5], 2, samples=9)):
        with pytest.raises(CheckpointError, match=r"batches was \d+ and is \d+\. Pass the same data"):
            Loader(x, sampler=other).keyed(8).load_state_dict(state)
    with pytest.raises(CheckpointError, match="sampler was 'WeightedSampler' and is 'BucketSampler'"):
        Loader(x, sampler=BucketSampler([1] * 4, 2)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="batch_size was not noted and is 2"):
        Loader(x, 2).load_state_dict(state)


@pytest.mark.parametrize("others", [{"batch_size": 8}, {"shuffle": True}, {"drop_last": True}, {"shuffle": Blocks(2)}])
def test_what_the_sampler_decides_cannot_be_given_as_well(others: Any) -> None:
    ((name, value),) = others.items()
    with pytest.raises(SettingError) as error:
        Loader(torch.arange(2), sampler=WeightedSampler([1, 2]), **others)
    assert str(error.value) == (
        f"Loader({name}={value!r}) cannot be used with sampler=WeightedSampler(2 weights, batch_size=64, samples=2), "
        "which makes the batches. Leave it out here; a batch size is an argument of the sampler"
    )


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([3, -2, 5], "lengths[1] is -2"),
        ([3, 2.5], "lengths[1] is 2.5"),
        ([float("nan"), 1], "lengths[0] is nan"),
        (torch.tensor([1.0, torch.inf]), "lengths[1] is inf"),
    ],
)
def test_a_length_that_is_no_whole_number_is_refused(lengths: Any, says: str) -> None:
    with pytest.raises(DataError) as error:
        BucketSampler(lengths, 2)
    assert str(error.value) == f"{says}; expected a whole number from 0 for each sample"


def test_lengths_may_be_whole_numbers_of_any_dtype_and_0() -> None:
    wanted = rows(BucketSampler([3, 0, 5, 5], tokens=10))
    assert rows(BucketSampler(np.array([3.0, 0.0, 5.0, 5.0]), tokens=10)) == wanted
    assert rows(BucketSampler(torch.tensor([3, 0, 5, 5], dtype=torch.uint8), tokens=10)) == wanted


def test_a_sampler_for_other_data_and_one_of_torch_are_refused() -> None:
    with pytest.raises(DataError, match=r"WeightedSampler\(3 weights, .*\) was made for 3 samples, and the data has 2"):
        Loader(torch.arange(2), sampler=WeightedSampler([1, 2, 3]))
    theirs: Any = torch.utils.data.RandomSampler(range(3))
    with pytest.raises(SettingError, match=r"has no batches\(epoch, key\), .* torch\.utils\.data\.DataLoader\(dataset"):
        Loader(torch.arange(3), sampler=theirs)


class Gives:
    def __init__(self, *indices: Any) -> None:
        self.indices = indices

    def batches(self, epoch: int, key: int) -> Any:
        return [[0, 1], *self.indices]


@pytest.mark.parametrize("data", [torch.arange(16), list(range(16))], ids=["arrays", "dataset"])
@pytest.mark.parametrize(
    ("indices", "bad"),
    [([2.7, 3], "2.7"), ([1, -1], "-1"), ([99], "99"), (torch.tensor([3, 16]), "16"), ([True, False], "True")],
)
def test_an_index_that_the_data_does_not_have_is_named_with_its_sampler(data: Any, indices: Any, bad: str) -> None:
    data = data if isinstance(data, torch.Tensor) else _Squares()
    batches = iter(Loader(data, sampler=Gives(indices)))
    next(batches)
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"Gives.batches gave the index {bad}")
    assert str(caught.value).endswith(
        " in batch 2 of epoch 1; expected whole numbers from 0 to 15, for the data has 16 samples"
    )


class _Squares(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> int:
        return i * i
