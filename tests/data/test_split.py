from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from loopwright.data.loader import Loader
from loopwright.data.split import folds, train_valid_split
from loopwright.errors import DataError, SettingError

counts = st.integers(2, 60)
labels = st.lists(st.integers(0, 4), min_size=2, max_size=60)


def both(data: Any, *args: Any, **options: Any) -> tuple[list[int], list[int]]:
    train, valid = train_valid_split(data, *args, **options)
    return list(map(int, train)), list(map(int, valid))


@given(counts, st.floats(0.01, 0.99), st.integers(0, 9))
def test_every_sample_is_in_one_part_in_its_order_and_the_sizes_are_exact(n: int, share: float, seed: int) -> None:
    train, valid = both(np.arange(n), share, seed=seed)
    assert sorted(train + valid) == list(range(n))
    assert train == sorted(train)
    assert valid == sorted(valid)
    assert len(valid) == min(max(round(share * n), 1), n - 1)


def test_the_split_is_a_function_of_the_seed_and_the_length_alone() -> None:
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    one = both(np.arange(100))
    torch.manual_seed(5)
    assert both(np.arange(100)) == one
    assert both(torch.arange(100)) == one
    assert both(np.arange(100), seed=1) != one
    torch.set_rng_state(state)
    both(np.arange(100), stratify=np.arange(100) % 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == legacy  # type: ignore[index, union-attr]


@given(labels, st.floats(0.05, 0.95), st.integers(0, 9))
def test_every_class_gives_its_share(labels: list[int], share: float, seed: int) -> None:
    n = len(labels)
    _, valid = both(np.arange(n), share, seed=seed, stratify=labels)
    m = min(max(round(share * n), 1), n - 1)
    assert len(valid) == m
    given_, whole = Counter(labels[i] for i in valid), Counter(labels)
    assert all(abs(given_[c] - whole[c] * m / n) < 1 for c in whole)


@given(labels, st.floats(0.05, 0.95), st.integers(0, 9))
def test_no_group_is_in_both_parts(groups: list[int], share: float, seed: int) -> None:
    assume(len(set(groups)) > 1)
    n = len(groups)
    train, valid = both(np.arange(n), share, seed=seed, groups=groups)
    assert not {groups[i] for i in train} & {groups[i] for i in valid}
    assert sorted(train + valid) == list(range(n))
    smallest = min(Counter(groups).values())
    assert 0 < len(valid) <= max(min(max(round(share * n), 1), n - 1), smallest)
    left = min(max(round(share * n), 1), n - 1) - len(valid)
    assert len(valid) == smallest or all(Counter(groups)[g] > left for g in {groups[i] for i in train})


@given(labels, st.floats(0.05, 0.95))
def test_the_latest_are_validated_on(times: list[int], share: float) -> None:
    n = len(times)
    m = min(max(round(share * n), 1), n - 1)
    assume(sorted(times)[n - m] != min(times))
    train, valid = both(np.arange(n), share, by_time=times)
    assert max(times[i] for i in train) < min(times[i] for i in valid)
    assert len(valid) >= m
    assert len({i for i in valid if times[i] > min(times[i] for i in valid)}) < m


def test_times_may_be_dates_and_data_in_order_of_time_gives_views() -> None:
    times = pd.to_datetime(["2024-03-01", "2024-01-01", "2024-02-01", "2024-04-01"])
    assert both(np.arange(4), 0.5, by_time=times) == ([1, 2], [0, 3])
    x = torch.arange(10)
    train, valid = train_valid_split({"x": x}, 3, by_time=True)
    assert (train["x"].tolist(), valid["x"].tolist()) == ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9])
    assert valid["x"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_each_kind_of_data_gives_its_own_kind() -> None:
    frame = pd.DataFrame({"a": range(10), "b": list("abcdefghij")}, index=range(5, 15))
    train, valid = train_valid_split((torch.arange(10), [np.arange(10), frame]), 3)
    assert (type(train), type(train[1]), type(valid[1][1])) == (tuple, list, pd.DataFrame)
    assert valid[0].tolist() == valid[1][0].tolist() == valid[1][1]["a"].tolist()
    dataset = TensorDataset(torch.arange(10))
    subset = train_valid_split(dataset, 3)[1]
    assert type(subset) is Subset
    assert [int(x) for (x,) in subset] == valid[0].tolist()


def test_a_dataset_with_a_select_of_its_own_selects() -> None:
    class Selecting:
        def __init__(self, rows: list[int]) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> int:
            return self.rows[i]

        def select(self, rows: list[int]) -> Selecting:
            return Selecting([self.rows[i] for i in rows])

    train, valid = train_valid_split(Selecting(list(range(10))), 3)
    assert type(train) is type(valid) is Selecting
    assert sorted(train.rows + valid.rows) == list(range(10))


@given(counts, st.integers(2, 6), st.integers(0, 5))
def test_folds_share_out_all_samples_evenly(n: int, k: int, seed: int) -> None:
    assume(k <= n)
    pairs = [(t.tolist(), v.tolist()) for t, v in folds(np.arange(n), k, seed=seed)]
    assert sorted(i for _, v in pairs for i in v) == list(range(n))
    assert all(sorted(t + v) == list(range(n)) for t, v in pairs)
    sizes = [len(v) for _, v in pairs]
    assert len(sizes) == k
    assert max(sizes) - min(sizes) <= 1


@given(labels, st.integers(2, 4))
def test_folds_keep_classes_even_and_groups_whole(labels: list[int], k: int) -> None:
    n = len(labels)
    assume(k <= n)
    parts = [v.tolist() for _, v in folds(np.arange(n), k, stratify=labels)]
    for label in set(labels):
        each = [sum(labels[i] == label for i in v) for v in parts]
        assert max(each) - min(each) <= 1
    assume(len(set(labels)) >= k)
    where = [{labels[i] for i in v} for _, v in folds(np.arange(n), k, groups=labels)]
    assert all(where)
    assert sum(map(len, where)) == len(set().union(*where)) == len(set(labels))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def streaming() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    "data",
    [
        [(torch.full((4, 2), i), torch.full((4,), i)) for i in range(5)],  # ready batches, all of one size
        [{"x": torch.full((4 - i % 2,), i)} for i in range(5)],
        [np.full(3 + i, i) for i in range(5)],  # of different lengths
        [np.full((2, 2), i) for i in range(5)],
        [{"text": "a", "label": i} for i in range(5)],
        ["one", "two", "three", "four", "five"],
    ],
)
def test_a_list_is_split_by_its_entries_whatever_they_are(data: list[Any]) -> None:
    train, valid = train_valid_split(data, 2)
    assert type(train) is type(valid) is list
    numbers = train_valid_split(np.arange(5), 2)
    assert [[id(one) for one in part] for part in (train, valid)] == [[id(data[i]) for i in part] for part in numbers]
    assert sorted(id(one) for _, part in folds(data, 2) for one in part) == sorted(map(id, data))
    with pytest.raises(SettingError, match="k=6; expected a whole number from 2 to 5, the number of batches in the li"):
        folds(data, 6)


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta", "ignore:Sparse CSC tensor support is in beta"
)
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_coo])
def test_rows_of_a_sparse_tensor_are_taken(layout: torch.layout) -> None:
    x = torch.diag(torch.arange(1.0, 8))
    train, valid = train_valid_split(x.to_sparse(layout=layout), 3)
    rows = train_valid_split(torch.arange(7), 3)
    assert torch.equal(train.to_dense(), x[rows[0]])
    assert torch.equal(valid.to_dense(), x[rows[1]])


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        (np.arange(9), {"valid": 1.5}, SettingError, "valid=1.5; expected a share between 0 and 1, or a number of"),
        (np.arange(9), {"valid": 9}, SettingError, "or a number of samples from 1 to 8"),
        (
            np.arange(9),
            {"stratify": [0], "groups": [0]},
            SettingError,
            "stratify and groups cannot be kept at the same",
        ),
        (np.arange(2), {"stratify": [1, np.nan]}, DataError, r"stratify\[1\] is nan; expected a class for each sample"),
        (np.arange(2), {"stratify": [1, 0.25]}, DataError, r"stratify\[1\] is 0\.25; expected a class for each sample"),
        (np.arange(9), {"stratify": [0, 1]}, SettingError, r"stratify has shape \(2,\); expected one entry a sample"),
        (np.arange(3), {"groups": [1, 1, 1]}, DataError, "all samples are of one group"),
        (np.arange(3), {"by_time": [1, 1, 1]}, DataError, "as early as all others"),
        (np.arange(3), {"by_time": [1, np.nan, 1]}, DataError, "not a number"),
        (np.arange(1), {}, DataError, "cannot split 1 sample into two parts"),
        ((np.arange(3), np.arange(4)), {}, DataError, r"different lengths: data\[0\] has 3, data\[1\] has 4\. Columns"),
        (([np.ones(2), np.ones(5)], [0, 1]), {}, DataError, r"one of columns, and data\[1\]\[0\] is no array. Turn n"),
        (
            ([np.ones(2), np.ones(5)], np.arange(2)),
            {},
            DataError,
            r"Where the samples themselves are of different lengths, .*: torch\.utils\.data\.StackDataset\(x, y\)",
        ),
        (
            [np.ones(9), np.ones(9)],
            {},
            DataError,
            "a list of 2 arrays with 9 entries each: it may be one of columns, or",
        ),
        ([(np.ones(9), np.ones(9)), np.ones(9)], {}, DataError, r"Give columns as a tuple, \(x, y\)"),
        ([np.ones(9)], {}, DataError, r"split the numbers, np\.arange\(1\), and pick from the list"),
        ([(np.ones(9), np.ones(9))], {}, DataError, "cannot split 1 batch into two parts"),
        (
            Stream(),
            {},
            DataError,
            r"Stream, a stream: its samples come one .*Subset\(samples, range\(len\(samples\)\)\)",
        ),
        (
            iter([1]),
            {},
            DataError,
            r"list_iterator, which is only iterated: its batches come .* split that: list\(data\)",
        ),
        (streaming, {}, DataError, r"cannot split streaming, a function: .* split that: list\(streaming\(\)\)"),
        (
            DataLoader([1, 2]),
            {},
            DataError,
            r"cannot split a loader, .*: split what it reads, loader\.dataset, and make",
        ),
        (
            Loader(np.ones(3)),
            {},
            DataError,
            r"cannot split a loader, .*: split what it reads, loader\.data, and make two",
        ),
        ("ab", {}, DataError, "cannot split str; expected arrays, a data frame, a list, or a dataset"),
    ],
)
def test_what_cannot_be_split_says_why(data: Any, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        train_valid_split(data, **options)


def test_folds_need_enough_samples_and_groups() -> None:
    with pytest.raises(SettingError, match="k=4; expected a whole number from 2 to 3"):
        folds(np.arange(3), 4)
    with pytest.raises(DataError, match="there are 2 groups, too few for 3 folds"):
        folds(np.arange(4), 3, groups=[0, 0, 1, 1])
